"""Real Ray nodes, a real S3-compatible server and connections that break, on one machine; for `chaos.py` and the tests.

    with S3Server() as store, LocalNodes(store.environment, folder) as nodes:
        nodes.add(num_cpus=1)
        job = nodes.submit(["s2l", "run", ...], working_dir)

Nodes are started and jobs submitted by Ray's own commands, with token authentication. Only what was started here is ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

BIN = Path(sys.executable).parent
START_SECONDS = 60.0
JOINED = b"Ray runtime started."


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(what: str, is_there: Any, seconds: float = START_SECONDS) -> None:
    """Return once `is_there()` is true. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not is_there():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not there after {seconds:.0f} s")
        time.sleep(0.2)


def accepts(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def end(process: psutil.Process | subprocess.Popen[Any]) -> None:
    """Kill a process and all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        for one in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    if isinstance(process, subprocess.Popen):
        process.wait()


class Relay:
    """A port that hands on to another; `break_all()` cuts every connection that is open."""

    def __init__(self, target: int) -> None:
        self._target, self._open, self._lock = target, set[socket.socket](), threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    near.close()
                    continue
                with self._lock:
                    self._open |= {near, far}
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    def _copy(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(2**16):
                other.sendall(data)
        for end_of in (one, other):
            with contextlib.suppress(OSError):
                end_of.shutdown(socket.SHUT_RDWR)
            with self._lock:
                self._open.discard(end_of)
            end_of.close()

    def break_all(self) -> int:
        """Cut every open connection; how many."""
        with self._lock:
            found = list(self._open)
        for one in found:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        return len(found) // 2

    def close(self) -> None:
        self._server.close()
        self.break_all()


class S3Server:
    """moto's server in a process of its own with one bucket, behind a relay."""

    def __init__(self, secret: str = "test") -> None:  # noqa: S107
        self._secret = secret

    def __enter__(self) -> S3Server:
        port = free_port()
        self.bucket = f"runs-{port}"  # of this server: a process that uses two keeps connections by bucket
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for("the S3 server", lambda: accepts(port))
        self.relay = Relay(port)
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.relay.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        import boto3

        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys).create_bucket(Bucket=self.bucket)
        return self

    def __exit__(self, *_: object) -> None:
        self.relay.close()
        end(self._process)


class LocalNodes:
    """A Ray of several nodes on this machine: a head, by default without CPUs for tasks, and workers that come and go.

    With `autoscaling` (the config of a Ray cluster, its provider apart) Ray's autoscaler starts and ends them, as fake nodes.
    """

    def __init__(
        self, environment: dict[str, str], folder: Path, *, head_cpus: int = 0, autoscaling: dict[str, Any] | None = None
    ) -> None:
        self._folder, self._head_cpus = folder, head_cpus
        self._ray = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)  # sockets want a short path
        token = folder / "token"
        token.write_text(secrets.token_hex(16))
        token.chmod(0o600)
        # No variable of the caller may lead to another Ray.
        ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = ours | environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment["RAY_raylet_start_wait_time_s"] = "120"  # a busy machine
        self._autoscaling = autoscaling
        self.workers: list[subprocess.Popen[Any]] = []
        self._started = 0

    def __enter__(self) -> LocalNodes:
        self._gcs, self._dashboard = free_port(), free_port()
        scaling = self._folder / "autoscaling.json"
        if self._autoscaling:
            provider = {"type": "fake_multinode", "gcs_address": self.address, "disable_node_updaters": True}
            provider |= {"disable_launch_config_check": True, "worker_liveness_check": False, "use_node_id_as_ip": True}
            scaling.write_text(json.dumps(self._autoscaling | {"provider": provider}))
        more = ["--head", f"--port={self._gcs}", "--include-dashboard=true", f"--dashboard-port={self._dashboard}"]
        more += ["--dashboard-host=127.0.0.1", f"--num-cpus={self._head_cpus}", f"--temp-dir={self._ray.name}"]
        more += [f"--autoscaling-config={scaling}"] if self._autoscaling else []
        self._head = self._start(more)
        try:
            wait_for("the head node", lambda: accepts(self._dashboard))
        except BaseException:
            end(self._head)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in [*self.workers, self._head]:
            end(node)
        self._ray.cleanup()

    @property
    def address(self) -> str:
        """What RAY_ADDRESS is for a driver on this machine."""
        return f"127.0.0.1:{self._gcs}"

    @property
    def logs(self) -> str:
        """Where Ray keeps its files."""
        return self._ray.name

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted."""
        return f"http://127.0.0.1:{self._dashboard}"

    def _start(self, more: list[str]) -> subprocess.Popen[Any]:
        command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
        command += [f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}"]
        command += ["--object-store-memory=200000000", *more]
        self._started += 1
        path = self._folder / f"node-{self._started}.log"
        with path.open("wb") as log:
            node = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(f"a node ({path})", lambda: JOINED in path.read_bytes() or node.poll() is not None, 150)
            if node.poll() is not None:
                raise RuntimeError(f"a node did not start: {path}")
        except BaseException:
            end(node)
            raise
        return node

    def add(self, num_cpus: int = 1) -> subprocess.Popen[Any]:
        """Start a worker node, and return when it has joined; on a busy machine one may need another try."""
        for left in (2, 1, 0):
            try:
                node = self._start([f"--address={self.address}", f"--num-cpus={num_cpus}"])
            except RuntimeError:
                if not left:
                    raise
            else:
                self.workers.append(node)
                break
        return node

    def remove(self, node: subprocess.Popen[Any]) -> None:
        """Lose a worker node, as when the power goes."""
        self.workers.remove(node)
        end(node)

    def submit(self, words: list[str], working_dir: Path | None, log: Path) -> subprocess.Popen[Any]:
        """`ray job submit`, which shows the driver's log and ends as the job does.

        Ray puts the working directory where all nodes of this machine look for it, and one that goes takes it along: where
        nodes go, there had better be none.
        """
        command = [str(BIN / "ray"), "job", "submit", "--address", self.dashboard]
        command += ["--", *words] if working_dir is None else ["--working-dir", str(working_dir), "--", *words]
        with log.open("ab") as file:
            return subprocess.Popen(command, env=self.environment, stdout=file, stderr=subprocess.STDOUT)

    def processes(self, *names: str) -> Iterator[psutil.Process]:
        """Processes of the nodes whose command line has one of the names, such as Ray's `ray::MapWorker`."""
        for node in [self._head, *self.workers]:
            with contextlib.suppress(psutil.NoSuchProcess):
                for one in psutil.Process(node.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if any(name in " ".join(one.cmdline()) for name in names):
                            yield one
