"""Source of a `sitecustomize` that traps unpickling in the service and the actors of a run.

Unpickling by `multiprocessing` or pebble, for the verifier and engine processes of an actor, is
permitted. It is logged too, which proves that the trap is active.
"""

SITECUSTOMIZE = """
import os, pickle, signal, sys

ROLES = [role for role in ("service", "actor") if role in sys.orig_argv]
if "speed_async.launcher.child" in sys.orig_argv and ROLES:
    def check(name):
        frame, files = sys._getframe(2), []
        while frame:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        own = any("/multiprocessing/" in file or "/pebble/" in file for file in files)
        with open(os.environ["TRAP_LOG"], "a") as log:
            log.write(f"{ROLES[0]} {'own' if own else 'TRAPPED'} {name} {files[:4]}\\\\n")
        if not own:
            raise RuntimeError(f"{name} was called")

    def trapped(name, original):
        def call(*args, **kwargs):
            check(name)
            return original(*args, **kwargs)
        return call

    class Unpickler(pickle.Unpickler):
        def __init__(self, *args, **kwargs):
            check("Unpickler")
            super().__init__(*args, **kwargs)

    pickle.loads = trapped("loads", pickle.loads)
    pickle.load = trapped("load", pickle.load)
    pickle.Unpickler = Unpickler

if "--multiprocessing-fork" in sys.orig_argv and os.environ.get("TRAP_KILLS"):
    from speed_async.environments.arithmetic import ArithmeticTask
    score = ArithmeticTask.score

    def score_or_kill(self, prompt, completion):
        if not prompt.held_out and prompt.prompt_id % 16 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(self, prompt, completion)

    ArithmeticTask.score = score_or_kill
"""
