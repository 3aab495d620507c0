"""EoRA. Grade it with: python -m pytest assignments/eora --submission FILE"""


def eora(E, H, r):
    """Two thin matrices that repair a compressed layer without training. [EoRA, arXiv 2410.21271]

    E = W - Q (out, in): what compression took; H (in, in) = mean of x x^T; r: rank.
    -> B (out, r), A (r, in), floating point: B A is the matrix of rank r for which the layer's output error

        ||X (E - B A)^T||^2 = tokens trace((E - B A) H (E - B A)^T)

    is least. With H = V diag(lambda) V^T:  E' = E V sqrt(lambda);  E' = U S Z^T, cut to r terms, B = U_r S_r;
    A = Z_r^T, brought back from the eigenspace. An input that is always zero makes lambda = 0: A and B must
    stay finite. E and H may not be changed.
    """
    raise NotImplementedError("write eora")
