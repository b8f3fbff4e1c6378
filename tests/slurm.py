"""A Slurm of one node, this machine, from Debian's packages munge, slurmctld and slurmd."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
PATH = f"{os.environ['PATH']}:/usr/sbin"

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=3000
SchedulerParameters=sched_interval=2,batch_sched_delay=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
KillWait=15
ReturnToService=0
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """The reason why Slurm cannot start here."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install munge slurmctld slurmd slurm-client"
    return None if os.geteuid() == 0 else "needs root, to start Slurm"


def call(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Run Slurm during the context; yields the environment variables for its clients."""
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    sockets = [socket.socket() for _ in range(2)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    conf = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    conf.write_text(CONF.format(folder=folder, host=host, ports=ports))
    (folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
    environment = {"SLURM_CONF": str(conf), "PATH": PATH}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    files = [
        f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("pid-file", "log-file")
    ]
    files += [f"--seed-file={folder}/munge.seed", f"--socket={folder}/munge.socket"]
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", *files]
    daemons = []
    try:
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
            where = {**os.environ, **environment}
            program = shutil.which(command[0], path=PATH) or ""
            daemons.append(subprocess.Popen([program, *command[1:]], env=where, **quiet))  # type: ignore[call-overload]
            time.sleep(0.5)
        last = time.monotonic() + 20
        while (
            "idle"
            not in subprocess.run(
                ["sinfo", "-h", "-o", "%T"],
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
            ).stdout
        ):
            if time.monotonic() > last or any(each.poll() is not None for each in daemons):
                logs = [path.read_text()[-2000:] for path in folder.glob("*.log")]
                raise RuntimeError("Slurm does not start: " + "\n".join(logs))
            time.sleep(0.3)
        yield environment
    finally:
        for each in reversed(daemons):
            each.terminate()
            try:
                each.wait(10)
            except subprocess.TimeoutExpired:
                each.kill()
