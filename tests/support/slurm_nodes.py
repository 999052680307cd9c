"""A real Slurm of several nodes on this machine, on the loopback interface, for tests.

Every node is a process, hostname and mount namespace of its own: one SIGKILL takes it and all it runs, as a
power cut would. Its first process is a shell, so that slurmd alone can be killed as well.

Debian: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

CONF = """
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.socket.2,cred_expire=15
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort=16817
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=2,sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
MinJobAge=600
SlurmdTimeout=10
MessageTimeout=10
TCPTimeout=2
KillWait=5
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=16000\n"


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    programs = ("slurmctld", "slurmd", "squeue", "munged", "unshare", "nsenter")
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    if absent := [name for name in programs if shutil.which(name, path=path) is None]:
        return f"Slurm is not installed: {', '.join(absent)}"
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        return "snakemake-executor-plugin-slurm is not installed"
    if os.geteuid() != 0:
        return "nodes of their own namespaces need root"
    trial = ["unshare", "--fork", "--pid", "--mount-proc", "--uts", "hostname", "trial"]
    if subprocess.run(trial, capture_output=True).returncode:
        return "namespaces cannot be made here"
    return None


def eventually(what: str, done: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.05)


class Slurm:
    """Context manager: up inside, and gone with all that it started afterwards."""

    def __init__(self, folder: Path, nodes: int = 3, hooks: dict[int, str] | None = None) -> None:
        self.folder, self.nodes, self.hooks = folder, nodes, hooks or {}
        self.inits: dict[int, subprocess.Popen] = {}
        self.daemons: list[subprocess.Popen] = []
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"]),
        }

    def __enter__(self) -> "Slurm":
        host = socket.gethostname().split(".")[0]
        for name in ("state", "log", "run", "munge"):
            (self.folder / name).mkdir(parents=True)
        names = " ".join(f"node{number}" for number in range(1, self.nodes + 1))
        # A slurmd binds to the address of its hostname.
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {host} {names}\n")
        conf = CONF.format(host=host, folder=self.folder)
        for number in range(1, self.nodes + 1):
            conf += NODE.format(number=number, host=host, port=17000 + number)
        (self.folder / "slurm.conf").write_text(conf)
        key = self.folder / "munge" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        Path("/etc/slurm").mkdir(exist_ok=True)  # over which the nodes bind their configuration
        try:
            self._daemon(
                *("munged", "--foreground", "--force", f"--key-file={key}"),
                *(f"--socket={self.folder}/munge/munge.socket.2", f"--pid-file={self.folder}/run/munged.pid"),
                *(f"--log-file={self.folder}/log/munged.log", f"--seed-file={self.folder}/munge/seed"),
            )
            eventually("munged", (self.folder / "munge" / "munge.socket.2").exists)
            self._daemon("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
            eventually("slurmctld", lambda: "UP" in self.ask("scontrol", "ping"))
            for number in range(1, self.nodes + 1):
                self.start(number)
            eventually("nodes", lambda: self.idle() == self.nodes)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for number in list(self.inits):
            self.cut(number)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(30)

    def _daemon(self, *line: str) -> None:
        with (self.folder / "log" / f"{line[0]}.out").open("w") as output:
            self.daemons.append(
                subprocess.Popen(line, env=self.environment, stdout=output, stderr=output, cwd=self.folder)
            )

    def ask(self, *line: str) -> str:
        done = subprocess.run(line, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout

    def idle(self) -> int:
        return int(self.ask("sinfo", "-h", "-t", "idle", "-o", "%D").strip() or 0)

    def start(self, number: int) -> None:
        """Power on: as the first process of the node a shell that outlives slurmd and reaps orphans."""
        boot = [
            f"mount --bind {self.folder} /etc/slurm",
            f"mount --bind {self.folder}/hosts /etc/hosts",
            f"hostname node{number}",
            self.hooks.get(number, "true"),
            f"{{ slurmd -D -N node{number} & while :; do wait; sleep 1; done; }}",
        ]
        line = ["unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--uts"]
        with (self.folder / "log" / f"node{number}.out").open("w") as output:
            self.inits[number] = subprocess.Popen(
                [*line, "sh", "-c", " && ".join(boot)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,
            )

    def cut(self, number: int) -> None:
        """Power off: the node and everything on it are gone at once."""
        process = self.inits.pop(number)
        process.kill()
        process.wait(30)

    def _inside(self, number: int) -> list[str]:
        """Enter the namespaces of a node."""
        [child] = (
            Path(f"/proc/{self.inits[number].pid}/task/{self.inits[number].pid}/children").read_text().split()
        )
        return ["nsenter", "-t", child, "--pid", "--mount", "--uts"]

    def processes(self, number: int) -> dict[int, str]:
        """Pids (of this machine) and command lines of a node."""
        found: dict[int, str] = {}
        pending = [self.inits[number].pid]
        while pending:
            pid = pending.pop()
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                for task in Path(f"/proc/{pid}/task").iterdir():
                    pending += map(int, (task / "children").read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found

    def kill_daemon(self, number: int) -> None:
        """slurmd alone: what it started lives on."""
        [daemon] = [
            pid
            for pid, line in self.processes(number).items()
            if line.startswith(f"slurmd -D -N node{number}")
        ]
        os.kill(daemon, signal.SIGKILL)

    def start_daemon(self, number: int) -> None:
        with (self.folder / "log" / f"node{number}.out").open("a") as output:
            subprocess.Popen(
                [*self._inside(number), "sh", "-c", f"setsid slurmd -D -N node{number} & sleep 1"],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            ).wait(60)
