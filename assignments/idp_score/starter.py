"""One attention layer of IDP. Grade it with: python -m pytest assignments/idp_score --submission FILE"""


def choose(q, K_p, owner, real):
    """The prompt of each row: the one to which its own tokens pay most attention on average. [§3.2]

    q (B, h, T, d_k) queries of the input; K_p (h, S, d_k) keys of all prompts, one behind the other;
    owner (S,) long: the prompt of each key, in order from 0; real (B, T) bool: False is padding.
    -> scores (B, m), choice (B,) long.

        s_k = mean over heads, real input tokens t and the tokens j of prompt k of  q_t . k_j / sqrt(d_k)

    before the softmax; the largest wins, of equal ones the lowest k. Prompts may differ in length.
    """
    raise NotImplementedError("write choose")


def discard(q, k, v, K_p, V_p, owner, real, choice):
    """Attention of the input to its own past and to the chosen prompt, as if no other prompt were there.

    q, k, v (B, h, T, d_k); K_p, V_p (h, S, d_k); choice (B,). -> out (B, h, T, d_k).
    Token t sees every token of the chosen prompt, and real tokens up to itself. What stands in rows of `out`
    that are padding does not matter.
    """
    raise NotImplementedError("write discard")
