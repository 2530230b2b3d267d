"""Entry point of one rank of `speed-async doctor` (internal).

Prints a line per stage, so that its parent can say where it hangs, and at last its result.
"""

import os
import sys

from speed_async.launcher.doctor.rank_output import print_result, print_stage
from speed_async.launcher.doctor.records import JOB
from speed_async.launcher.large_imports import large_imports
from speed_async.launcher.nccl_environment import nccl_environment
from speed_async.launcher.processes import die_with_parent


def main() -> int:
    job = JOB.validate_json(sys.argv[1])
    die_with_parent(job.parent_id)
    os.environ.update(nccl_environment(job.timeout_s))
    print_stage("loading PyTorch")
    with large_imports():
        from speed_async.launcher.doctor.exchange import exchange
    print_result(exchange(job, print_stage))
    sys.stdout.flush()
    os._exit(0)  # groups that failed may wait in their destructors


if __name__ == "__main__":
    sys.exit(main())
