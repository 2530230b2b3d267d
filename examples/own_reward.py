"""A reward function of your own. `own_reward.toml` adds it to the task's own score."""


def leading_digits(
    prompt: str, completion: str, answer: str, metadata: dict[str, object]
) -> dict[str, float]:
    """Share of correct leading digits. The key `reward` is the reward; others are only logged.

    The task's own score decides what passes, so the gate and the accuracy do not change.
    """
    given = completion.strip()
    num_correct = 0
    for digit, right in zip(given, answer, strict=False):
        if digit != right:
            break
        num_correct += 1
    return {"reward": num_correct / len(answer), "length": len(given)}
