"""Choose calibration text. Grade it with: python -m pytest assignments/calibration --submission FILE"""


def choose(model, chunks, k=32):
    """Which k of n chunks should GPTQ be calibrated on? model: the dense toy; chunks (n, T) token ids -> (k,).

    The answer is k different places in 0 .. n-1, a long tensor. It must be a rule: the same chunks, the same
    answer. The model may be asked anything, and neither it nor chunks may be changed:

        model(chunks).logits                                       (n, T, V): what it predicts
        model(chunks, output_hidden_states=True).hidden_states     a tuple of (n, T, d): what its layers read
    """
    raise NotImplementedError("write choose")
