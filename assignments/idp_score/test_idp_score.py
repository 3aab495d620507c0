"""The grader of idp_score."""
import torch

from assignments.grading import check_close, check_tensor, must, numbers, unchanged

ASKED, FENCED = ["choose", "discard"], ["idp_minimal", "methods.selectors"]
REACH = 1e-5                                               # largest difference from the slow version, float32


def case(seed, lengths=(2, 5, 3), B=3, h=2, T=6, d_k=8):
    """-> q, k, v, K_p, V_p, owner, real; row 1 is padded on the left, row 2 on the right."""
    q, k, v = (numbers(10 * seed + i, B, h, T, d_k) for i in range(3))
    K_p, V_p = (numbers(10 * seed + i, h, sum(lengths), d_k) for i in (3, 4))
    owner, real = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), torch.ones(B, T).bool()
    real[1, :2], real[2, 4:] = False, False
    return q, k, v, K_p, V_p, owner, real


def slow_scores(q, K_p, owner, real):
    """One product at a time. -> (B, m)."""
    (B, h, T, d_k), m = q.shape, int(owner[-1]) + 1
    scores = torch.empty(B, m)
    for b in range(B):
        for prompt in range(m):
            found = [q[b, head, t] @ K_p[head, j] / d_k ** 0.5 for head in range(h) for t in range(T) if real[b, t]
                     for j in range(len(owner)) if owner[j] == prompt]
            scores[b, prompt] = sum(found) / len(found)
    return scores


def slow_attention(q, k, v, K_p, V_p, owner, real, choice):
    """One query at a time, over the keys that it may see and nothing else. -> (B, h, T, d_k), 0 at padding."""
    out = torch.zeros_like(q)
    for b, head, t in ((b, i, t) for b in range(len(q)) for i in range(q.shape[1]) for t in range(q.shape[2])):
        if real[b, t]:
            own = [s for s in range(t + 1) if real[b, s]]
            keys = torch.cat([K_p[head, owner == choice[b]], k[b, head, own]])             # (seen, d_k)
            values = torch.cat([V_p[head, owner == choice[b]], v[b, head, own]])
            out[b, head, t] = (keys @ q[b, head, t] / q.shape[3] ** 0.5).softmax(0) @ values
    return out


def at_real(out, real):
    """Zero where a token is padding."""
    return torch.where(real[:, None, :, None], out, torch.zeros_like(out))


def test_shapes(submission):
    q, k, v, K_p, V_p, owner, real = case(0)
    scores, choice = submission.choose(q, K_p, owner, real)
    check_tensor(scores, (3, 3), "scores")
    check_tensor(choice, (3,), "choice")
    must(choice.dtype == torch.long, f"choice must be of dtype long, got {choice.dtype}")
    out = submission.discard(q, k, v, K_p, V_p, owner, real, choice)
    check_tensor(at_real(out, real), q.shape, "out")


def test_scores_equal_the_slow_version(submission):
    for seed in range(5):
        q, _, _, K_p, _, owner, real = case(seed)
        scores, choice = submission.choose(q, K_p, owner, real)
        right = slow_scores(q, K_p, owner, real)
        check_close(scores, right, "scores", REACH)
        must(torch.equal(choice, right.argmax(1)), f"choice is {choice.tolist()}, should be "
                                                   f"{right.argmax(1).tolist()}: the largest score of each row")


def test_a_tie_goes_to_the_lowest(submission):
    q, _, _, K_p, _, owner, real = case(6, lengths=(2, 2, 2))
    K_p[:, 2:4] = K_p[:, 4:] = K_p[:, :2]
    choice = submission.choose(q, K_p, owner, real)[1]
    must(choice.tolist() == [0, 0, 0], f"three equal prompts: choice is {choice.tolist()}, should be all 0")


def test_inputs_are_left_alone(submission):
    q, k, v, K_p, V_p, owner, real = case(7)
    with unchanged(q=q, k=k, v=v, K_p=K_p, V_p=V_p, owner=owner, real=real):
        choice = submission.choose(q, K_p, owner, real)[1]
        submission.discard(q, k, v, K_p, V_p, owner, real, choice)


def test_losers_leave_no_trace(submission):
    q, k, v, K_p, V_p, owner, real = case(8)
    choice = torch.tensor([1, 1, 1])
    before = at_real(submission.discard(q, k, v, K_p, V_p, owner, real, choice), real)
    K_p[:, owner != 1], V_p[:, owner != 1] = 100, 100
    after = at_real(submission.discard(q, k, v, K_p, V_p, owner, real, choice), real)
    check_close(after, before, "out, after the losing prompts were changed,")


def test_the_number(submission, record_property):
    """Within 1e-5 of the slow version, five seeds. Control: dropping losers after the softmax is far off."""
    for seed in range(5):
        q, k, v, K_p, V_p, owner, real = case(seed)
        choice = torch.tensor([2, 0, 1])
        right = slow_attention(q, k, v, K_p, V_p, owner, real, choice)
        out = at_real(submission.discard(q, k, v, K_p, V_p, owner, real, choice), real)
        check_close(out, right, "out", REACH)
        record_property("largest difference", (out - right).abs().max().item())
        gap = (too_late(q, k, v, K_p, V_p, owner, real, choice) - right).abs().max().item()
        record_property("largest difference, masked after the softmax", gap)
        must(gap > 100 * REACH, f"the control is within {gap:.3g}: this case would not show the mistake")


def too_late(q, k, v, K_p, V_p, owner, real, choice):
    """The control: one softmax over all prompts and the past, then the losers' shares are set to 0."""
    B, T, S = len(q), q.shape[2], len(owner)
    logits = torch.cat([q @ K_p.transpose(1, 2), q @ k.transpose(2, 3)], 3) / q.shape[3] ** 0.5    # (B, h, T, S+T)
    seen = torch.ones(T, T).tril().bool() & real[:, None, None]                                    # (B, 1, T, T)
    logits[..., S:] = logits[..., S:].masked_fill(~seen, -torch.inf)
    A = logits.softmax(3)
    A[..., :S] *= (owner == choice[:, None]).view(B, 1, 1, S)
    return at_real(A @ torch.cat([V_p.expand(B, -1, -1, -1), v], 2), real)
