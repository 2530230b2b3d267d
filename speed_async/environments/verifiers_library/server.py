"""Serves one environment of the `verifiers` library: its rows, and the scores of completions.

A script for the interpreter that has the library, which may lack this package: it imports the
standard library and verifiers only. Requests on stdin and replies on stdout are JSON, one per line:

| request | reply |
| --- | --- |
| `environment`, `arguments` (the first one) | `files`: the source of the environment |
| `split` (`train` or `eval`), `most` | `rows`, at most that many |
| `row`, `completion` | `score` |
| `completion` | `extracted` |

A request that fails has the reply `error`. The script ends when stdin closes or its parent dies.
"""

import asyncio
import copy
import ctypes
import importlib
import json
import logging
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
SWALLOWED = "Error calling"
"""Start of the message that the library logs when a reward function raises; it then counts 0."""


class Errors(logging.Handler):
    """Keeps the errors that the library logs instead of raising."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.texts = []

    def emit(self, record):
        if record.getMessage().startswith(SWALLOWED):
            self.texts.append(record.getMessage())


class Server:
    def __init__(self, environment, arguments):
        """Raises whatever the library raises, and TypeError for an environment of another kind."""
        vf = importlib.import_module("verifiers")
        self._vf = vf
        self._environment = vf.load_environment(environment, **arguments)
        self._errors = Errors()
        logging.getLogger("verifiers").addHandler(self._errors)  # cleared by loading the library
        kind = type(self._environment).__name__
        if not isinstance(self._environment, vf.SingleTurnEnv):
            raise TypeError(f"it is a {kind}; only a SingleTurnEnv can be used")
        if self._environment.rubric.has_group_rewards:
            raise TypeError("a reward of its rubric is of a group, not of one completion")
        weights = self._environment.rubric._get_reward_weights()
        self._most = sum(weight for weight in weights if weight > 0)
        if not self._most:
            raise TypeError("its rubric has no reward with a positive weight")
        module = sys.modules.get(environment.replace("-", "_").split("/")[-1])
        file = vars(module).get("__file__") if module else None
        self.files = [file] if file else []

    def rows(self, split, most):
        """Of the split `eval`, none if the environment has only rows for training."""
        if split == "train":
            rows = self._environment.get_dataset(most)
        elif self._environment.build_eval_dataset() is None:
            rows = []
        else:
            rows = self._environment.get_eval_dataset(most)
        return [dict(row) for row in rows]

    async def score(self, row, completion):
        """The weighted sum of the rewards, divided by the sum of the positive weights."""
        environment = self._environment
        client = self._vf.ClientConfig(api_base_url="http://127.0.0.1:9")  # nothing is generated
        state = await environment.init_state(copy.deepcopy(row), client, "policy")
        state = await environment.setup_state(state) or state
        state["completion"] = _messages(completion)
        state["is_completed"] = True
        self._errors.texts.clear()
        await environment.rubric.score_rollout(state)
        if self._errors.texts:
            raise RuntimeError(self._errors.texts[0])
        return state["reward"] / self._most

    def extracted(self, completion):
        answer = self._environment.parser.parse_answer(_messages(completion))
        return None if answer is None else str(answer)


def _messages(completion):
    library = importlib.import_module("verifiers.utils.message_utils")
    messages = [{"role": "assistant", "content": completion}]
    return library.normalize_messages(messages, field_name="completion")


def _answer(server, request, loop):
    if "split" in request:
        return {"rows": server.rows(request["split"], request["most"])}
    if "row" in request:
        coroutine = server.score(request["row"], request["completion"])
        return {"score": loop.run_until_complete(coroutine)}
    return {"extracted": server.extracted(request["completion"])}


def main():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.path[0] = os.getcwd()  # not the folder of this script, whose modules would hide others
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the environment prints is no reply
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    server = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if server is None:
                server = Server(request["environment"], request["arguments"])
                reply = {"files": server.files}
            else:
                reply = _answer(server, request, loop)
            text = json.dumps(reply, default=str)
        except BaseException as error:  # third-party code may raise anything
            text = json.dumps({"error": f"{type(error).__name__}: {error}"})
        replies.write(text + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
