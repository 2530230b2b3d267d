"""Text of a `sitecustomize` that traps every reading of a pickle in a run's service and actors.

Reading that `multiprocessing` or pebble does for an actor's own verifier and engine processes goes
on; it is written down as well, which shows that the trap is set.
"""

SITECUSTOMIZE = """
import os, pickle, signal, sys

ROLES = [role for role in ("service", "actor") if role in sys.orig_argv]
if "speed_async.launcher.child" in sys.orig_argv and ROLES:
    def look(name):
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
            look(name)
            return original(*args, **kwargs)
        return call

    class Unpickler(pickle.Unpickler):
        def __init__(self, *args, **kwargs):
            look("Unpickler")
            super().__init__(*args, **kwargs)

    pickle.loads = trapped("loads", pickle.loads)
    pickle.load = trapped("load", pickle.load)
    pickle.Unpickler = Unpickler

if "--multiprocessing-fork" in sys.orig_argv and os.environ.get("TRAP_KILLS"):
    from speed_async.environments.arithmetic import ArithmeticTask
    score = ArithmeticTask.score

    def deadly(self, prompt, completion):
        if not prompt.held_out and prompt.prompt_id % 16 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(self, prompt, completion)

    ArithmeticTask.score = deadly
"""
