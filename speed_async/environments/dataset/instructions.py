"""Takes the instruction of a published file off its problems; `task.format` adds the user's own.

The texts are those around each problem of DAPO-Math-17k, and those that verl's preprocessing
scripts append to the problems of GSM8K and MATH.
"""

BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.",
)
AFTER = (
    'Remember to put your answer on its own line after "Answer:".',
    'Let\'s think step by step and output the final answer after "####".',
    "Let's think step by step and output the final answer within \\boxed{}.",
    "Please reason step by step, and put your final answer within \\boxed{}.",
)


def without_instruction(prompt: str) -> tuple[str, bool]:
    """The problem without a known instruction before and after it, and whether there was one."""
    text = prompt.strip()
    for before in BEFORE:
        text = text.removeprefix(before)
    for after in AFTER:
        text = text.removesuffix(after)
    problem = text.strip()
    return problem, len(problem) < len(prompt.strip())
