"""Real parts of a cluster: PostgreSQL, an MLflow server, Ray nodes, a network that can be cut.

A pytest plugin. Each part is a process of its own on this machine, on free ports; a test whose
part is missing is skipped, and the reason says what to install. Started as a program, this file
kills what is left of the parts when the tests have ended, however they ended.
"""

import base64
import ctypes
import importlib.util
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["trackers"]

ROOT = Path(__file__).resolve().parents[2]
MARK = "DIGITLAB_PART"  # in the environment of each process of a part: the folder it belongs to
SECONDS = 90.0  # for a part to be there

# What a person has set in the environment must not reach the parts.
_FOREIGN = ("PG", "MLFLOW_", "RAY_", "DIGITLAB_", "_MLFLOW_")


def clean_environment(part: Path, **more: str) -> dict[str, str]:
    """Of a process that belongs to the part in that folder."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN)}
    return kept | {MARK: str(part)} | more


def free_port(host: str = "127.0.0.1") -> int:
    """Below those that the kernel gives to outgoing connections, so that a server that was stopped
    finds its own again."""
    while True:
        port = random.randint(20_000, 32_000)
        with suppress(OSError), socket.socket() as probe:
            probe.bind((host, port))
            return port


def processes_of(part: Path) -> list[int]:
    """All processes that belong to the part in that folder, or to one inside it."""
    mark = f"{MARK}={part}".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            variables = environ.read_bytes().split(b"\0")
            if any(v == mark or v.startswith(mark + b"/") for v in variables):
                found.append(int(environ.parent.name))
    return found


def kill_part(part: Path) -> None:
    """As when the power goes: no process of it says a last word."""
    while processes := processes_of(part):
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)


def wait_until(there: Callable[[], bool], what: str, log: Path, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        if time.monotonic() > deadline:
            reported = log.read_text(errors="replace")[-3000:] if log.exists() else ""
            raise AssertionError(f"{what}: not there after {seconds:g} s\n{reported}")
        time.sleep(0.1)


@pytest.fixture(scope="session")
def parts() -> Iterator[Path]:
    """A folder for all parts, open to the user that PostgreSQL runs as; its path is short, since
    the name of a socket may have 107 characters. It goes with all processes that belong to it."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the parts of a cluster are started on Linux only")
    folder = Path(tempfile.mkdtemp(prefix="dl-", dir="/tmp"))
    folder.chmod(0o755)
    command = [sys.executable, __file__, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as keeper:
        yield folder
        keeper.communicate()


def _keep(folder: Path) -> None:
    sys.stdin.read()  # ends when the tests do, or when they are killed
    kill_part(folder)
    shutil.rmtree(folder, ignore_errors=True)


# PostgreSQL


def postgres_programs() -> Path:
    """The folder of initdb and postgres; Debian keeps it off the path."""
    candidates = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: -float(path.parent.name)
    )
    found = shutil.which("initdb")
    candidates += [Path(found).resolve().parent] if found else []
    for candidate in candidates:
        if (candidate / "initdb").exists() and (candidate / "postgres").exists():
            return candidate
    pytest.skip("PostgreSQL's server is missing: apt-get install postgresql")


class Postgres:
    """A server of its own that asks for a password, with a role `digitlab` that may little."""

    def __init__(self, folder: Path, programs: Path, host: str = "127.0.0.1") -> None:
        self.folder, self.programs, self.host = folder, programs, host
        self.password = secrets.token_urlsafe(18)
        self.port = free_port(host)
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.count = 0
        # The server refuses to run as root.
        self.account: dict[str, Any] = {}
        if os.geteuid() == 0:
            self.account = {"user": "postgres", "group": "postgres", "extra_groups": []}
        self._make()
        self.start()
        self.query(f"CREATE ROLE digitlab LOGIN PASSWORD '{self.password}'")

    def _make(self) -> None:
        self.folder.mkdir()
        password = self.folder / "password"
        password.touch(mode=0o600)
        password.write_text(self.password)
        if self.account:
            for path in (self.folder, password):
                shutil.chown(path, "postgres", "postgres")
        self._run(
            *("initdb", "--pgdata", str(self.folder / "data"), "--username", "postgres"),
            *("--auth", "scram-sha-256", "--pwfile", str(password)),
            *("--encoding", "UTF8", "--locale", "C.UTF-8"),
        )
        password.unlink()
        with open(self.folder / "data" / "pg_hba.conf", "w") as rules:
            rules.write("local all all scram-sha-256\nhost all all samenet scram-sha-256\n")

    def _run(self, program: str, *arguments: str) -> bytes:
        command = [str(self.programs / program), *arguments]
        environment = clean_environment(self.folder, PGPASSWORD=self.password)
        done: subprocess.CompletedProcess[bytes] = subprocess.run(
            command, env=environment, cwd="/", capture_output=True, check=False, **self.account
        )
        assert done.returncode == 0, f"{program}: {done.stderr.decode()}"
        return done.stdout

    def start(self) -> None:
        """Start it, if it does not run, and wait until it answers."""
        if self.process is not None:
            return
        options = {
            "port": self.port,
            "listen_addresses": self.host,
            "unix_socket_directories": self.folder,
            "max_connections": 300,
        }
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(str(self.programs / "postgres"), "-D", str(self.folder / "data")),
                    *(word for key, value in options.items() for word in ("-c", f"{key}={value}")),
                ],
                env=clean_environment(self.folder),
                cwd="/",
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **self.account,
            )
        wait_until(self._answers, "PostgreSQL", self.log)

    def _answers(self) -> bool:
        import psycopg

        try:
            self.query("SELECT 1")
        except psycopg.OperationalError:
            assert self.process is None or self.process.poll() is None, self.log.read_text()[-3000:]
            return False
        return True

    def stop(self, mode: str = "immediate") -> None:
        """`fast` says goodbye; `immediate` is as a crash, and the next start reads the log."""
        if self.process is None:
            return
        self.process.send_signal({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])
        self.process.wait(60)
        self.process = None

    def restart(self, mode: str = "fast") -> None:
        self.stop(mode)
        self.start()

    def query(self, sql: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """As the superuser, on this machine's own socket, each statement for itself."""
        import psycopg

        with psycopg.connect(
            host=str(self.folder),
            port=self.port,
            user="postgres",
            password=self.password,
            dbname=database,
            autocommit=True,
            connect_timeout=10,
        ) as connection:
            cursor = connection.execute(sql)
            return cursor.fetchall() if cursor.description else []

    def create(self, database: str = "", template: str = "template0") -> str:
        """Make a database that belongs to `digitlab`, and give its address."""
        self.count += 1
        database = database or f"database_{self.count}"
        self.query(f'CREATE DATABASE "{database}" OWNER digitlab TEMPLATE "{template}"')
        return self.address(database)

    def address(self, database: str) -> str:
        """As `study.storage` takes it: the password comes from elsewhere."""
        return f"postgresql+psycopg://digitlab@{self.host}:{self.port}/{database}"

    def dump(self) -> bytes:
        """All that it holds, but for what it keeps of passwords."""
        place = ("--host", str(self.folder), "--port", str(self.port), "--username", "postgres")
        return self._run("pg_dumpall", "--no-role-passwords", *place)


def _need_psycopg() -> None:
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is missing: run `make setup`")


@pytest.fixture(scope="session")
def postgres_server(parts: Path) -> Iterator[Postgres]:
    _need_psycopg()
    server = Postgres(parts / "postgres", postgres_programs())
    yield server
    server.stop()


@pytest.fixture
def postgres(postgres_server: Postgres) -> Iterator[Postgres]:
    """The server of all tests of this process; it runs before and after each of them."""
    postgres_server.start()
    yield postgres_server
    postgres_server.start()


# MLflow


class MlflowServer:
    """`mlflow server`, its records in PostgreSQL and its artifacts in a folder, behind a password.

    With `auth=False` it answers anyone.
    """

    def __init__(self, folder: Path, store: str, password: str, auth: bool = True) -> None:
        self.folder, self.store = folder, store
        self.host = store.partition("@")[2].partition(":")[0]
        self.port = free_port(self.host)
        self.uri = f"http://{self.host}:{self.port}"
        self.log = folder / "log"
        self.auth = auth
        self.credentials: dict[str, str] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = {
            "PGPASSWORD": password,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes for the GenAI side
        }
        folder.mkdir()
        if auth:
            self._ask_for_password()
        self.start()
        if auth:
            self._add_user()

    def _ask_for_password(self) -> None:
        config = self.folder / "basic_auth.ini"
        config.write_text(
            "[mlflow]\n"
            "default_permission = NO_PERMISSIONS\n"
            f"database_uri = sqlite:///{self.folder / 'auth.db'}\n"
            "admin_username = admin\n"
            "auth_cache_ttl_seconds = 60\n"  # else each request costs a slow hash
        )
        self.environment |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_AUTH_ADMIN_PASSWORD": secrets.token_urlsafe(18),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(18),
        }

    def _add_user(self) -> None:
        """Those who use it are not its admin."""
        name, password = "digitlab", secrets.token_urlsafe(18)
        admin = f"admin:{self.environment['MLFLOW_AUTH_ADMIN_PASSWORD']}".encode()
        request = urllib.request.Request(
            f"{self.uri}/api/2.0/mlflow/users/create",
            json.dumps({"username": name, "password": password}).encode(),
            {
                "Authorization": f"Basic {base64.b64encode(admin).decode()}",
                "Content-Type": "application/json",
            },
        )
        urllib.request.urlopen(request, timeout=30).close()
        self.credentials = {
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": password,
        }

    def start(self) -> None:
        """Start it, if it does not run, and wait until it answers."""
        if self.process is not None:
            return
        arguments = {
            "backend-store-uri": self.store,
            "artifacts-destination": (self.folder / "artifacts").as_uri(),
            "host": self.host,
            "port": self.port,
            "workers": 1,
            "allowed-hosts": f"{self.host}:{self.port}",
        }
        arguments |= {"app-name": "basic-auth"} if self.auth else {}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server"),
                    *(
                        word
                        for key, value in arguments.items()
                        for word in (f"--{key}", str(value))
                    ),
                ],
                env=clean_environment(self.folder, **self.environment),
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_until(self._answers, "MLflow's server", self.log)

    def _answers(self) -> bool:
        assert self.process is None or self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return True
        except OSError:
            return False

    def stop(self) -> None:
        """As a crash."""
        if self.process is None:
            return
        kill_part(self.folder)
        self.process.wait()
        self.process = None


@pytest.fixture(scope="session")
def mlflow_tables(postgres_server: Postgres, parts: Path) -> str:
    """The name of a database with MLflow's tables, which take seconds to make, to copy from."""
    address = postgres_server.create("mlflow_tables")
    environment = clean_environment(parts / "mlflow-tables", PGPASSWORD=postgres_server.password)
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", address]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return "mlflow_tables"


def _need_auth() -> None:
    if importlib.util.find_spec("flask_wtf") is None:
        pytest.skip("flask-wtf is missing, MLflow's basic-auth needs it: pip install flask-wtf")


@pytest.fixture
def mlflow_server(postgres: Postgres, mlflow_tables: str, parts: Path) -> Iterator[MlflowServer]:
    """An empty one for each test."""
    _need_auth()
    name = f"mlflow_{secrets.token_hex(4)}"
    store = postgres.create(name, mlflow_tables)
    server = MlflowServer(parts / name, store, postgres.password)
    yield server
    server.stop()
    shutil.rmtree(server.folder)
    postgres.start()
    postgres.query(f'DROP DATABASE "{name}" WITH (FORCE)')


# A network


class Network:
    """Two network namespaces and a cable between them; the test itself is in the near one.

    What the test starts there, or by `far(...)` there, has that one's addresses only. Neither has
    a way out, and this machine's own network is left as it is.
    """

    near_host, far_host = "10.213.77.1", "10.213.77.2"

    def __init__(self) -> None:
        self.name = f"digitlab-{os.getpid()}"
        self.places = [f"{self.name}-near", f"{self.name}-far"]
        self.home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        near, far = self.places
        try:
            for place in self.places:
                _ip("netns", "add", place)
            _ip("-n", near, "link", "add", "cable", "type", "veth", "peer", "cable", "netns", far)
            for place, host in ((near, self.near_host), (far, self.far_host)):
                _ip("-n", place, "addr", "add", f"{host}/30", "dev", "cable")
                _ip("-n", place, "link", "set", "lo", "up")
                _ip("-n", place, "link", "set", "cable", "up")
            with open(f"/run/netns/{near}") as namespace:
                _enter(namespace.fileno())
        except BaseException:
            self.close()
            raise

    def far(self, *command: str) -> list[str]:
        """The command, to be run on the far side."""
        return ["ip", "netns", "exec", self.places[1], *command]

    def cut(self) -> None:
        """Nothing passes any more, and neither side learns of it."""
        _ip("-n", self.places[0], "link", "set", "cable", "down")

    def join(self) -> None:
        """And wait until the far side has noticed, which it does within a second or so."""
        _ip("-n", self.places[0], "link", "set", "cable", "up")
        while "state UP" not in _ip("-n", self.places[1], "link", "show", "cable"):
            time.sleep(0.05)

    def close(self) -> None:
        _enter(self.home)
        os.close(self.home)
        for place in self.places:
            with suppress(OSError):
                _ip("netns", "del", place)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _enter(namespace: int) -> None:
    """Move this thread, and what it starts from now on; os.setns is Python 3.12's."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.setns(namespace, 0x40000000) != 0:  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), "setns")


@pytest.fixture
def network() -> Iterator[Network]:
    if shutil.which("ip") is None:
        pytest.skip("the program `ip` is missing: apt-get install iproute2")
    try:
        network = Network()
    except OSError as error:
        pytest.skip(f"this machine allows no network namespaces ({error}): run as root")
    yield network
    network.close()


@pytest.fixture
def near_postgres(network: Network, parts: Path) -> Iterator[Postgres]:
    """A server that both sides of the network reach."""
    _need_psycopg()
    folder = parts / f"postgres-{secrets.token_hex(4)}"
    server = Postgres(folder, postgres_programs(), network.near_host)
    yield server
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture
def near_mlflow(near_postgres: Postgres, parts: Path) -> Iterator[MlflowServer]:
    """A server that both sides of the network reach."""
    _need_auth()
    folder = parts / f"mlflow-{secrets.token_hex(4)}"
    server = MlflowServer(folder, near_postgres.create(), near_postgres.password)
    yield server
    server.stop()
    shutil.rmtree(folder)


# Ray

_COUNT_NODES = """
import json, sys, time, ray
ray.init(sys.argv[1], log_to_driver=False, configure_logging=False)
deadline = time.monotonic() + float(sys.argv[3])
while True:
    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) == int(sys.argv[2]) or time.monotonic() > deadline:
        break
    time.sleep(0.2)
print(json.dumps(sorted(node["NodeManagerAddress"] for node in alive)))
"""


class RayNode:
    """A raylet with its workers, as on a machine of its own: a lab, a folder, an address."""

    def __init__(self, folder: Path, host: str) -> None:
        self.folder, self.host = folder, host
        self.lab = folder / "lab"
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.lab.mkdir(parents=True)


class RayCluster:
    """A cluster of nodes on this machine that asks for a token; node 0 is the head.

    Nodes have addresses of their own on the loopback device; with a `network`, those of its near
    side and of its far side.
    """

    def __init__(self, folder: Path, network: Network | None = None) -> None:
        self.folder, self.network = folder, network
        self.token = secrets.token_hex(16)
        head = network.near_host if network else "127.0.0.2"  # 127.0.0.1 is taken for any
        self.port = free_port(head)
        self.address = f"{head}:{self.port}"
        self.environment = self._environment(self.token)
        self.nodes: list[RayNode] = []

    @staticmethod
    def _environment(token: str) -> dict[str, str]:
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    @property
    def labs(self) -> list[Path]:
        return [node.lab for node in self.nodes]

    def add(self, cpus: int = 1, gpus: int = 0, **environment: str) -> RayNode:
        """One more node, with more in its environment; the first is the head."""
        number = len(self.nodes)
        node = RayNode(self.folder / str(number), self._host(number))
        self.nodes.append(node)
        self._start(node, cpus, self.environment | environment, gpus)
        return node

    def _host(self, number: int) -> str:
        if self.network is None:
            return f"127.0.0.{2 + number}"
        return self.network.far_host if number else self.network.near_host

    def join(self, environment: dict[str, str]) -> RayNode:
        """Try to add a node that has another environment; its `process` shows what came of it."""
        number = len(self.nodes)
        node = RayNode(self.folder / f"{number}-{secrets.token_hex(2)}", self._host(number))
        self._start(node, 1, environment)
        return node

    def _start(self, node: RayNode, cpus: int, environment: dict[str, str], gpus: int = 0) -> None:
        place: dict[str, object] = {"address": self.address}
        if node.host == self.address.partition(":")[0]:
            place = {"port": self.port, "include-dashboard": "false"}
        place |= {
            "node-ip-address": node.host,
            "num-cpus": cpus,
            "num-gpus": gpus,  # Ray counts what it is given
            "object-store-memory": 80_000_000,  # bytes; less is refused
            "temp-dir": node.folder,
            "min-worker-port": 0,  # any free one
            "max-worker-port": 0,
        }
        head = ["--head"] if "port" in place else []
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *head),
            *(f"--{key}={value}" for key, value in place.items()),
        ]
        if self.network and not head:
            command = self.network.far(*command)
        with open(node.log, "ab") as log:
            node.process = subprocess.Popen(
                command,
                env=clean_environment(
                    node.folder,
                    DIGITLAB_HOME=str(node.lab),
                    SPT_NOENV="1",  # a worker's new title would overwrite its environment
                    **{"PYTHONPATH": str(ROOT / "src"), **environment},
                ),
                cwd=node.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, count: int, seconds: float = SECONDS) -> list[str]:
        """Wait until that many nodes are alive in the head's eyes; gives their addresses."""
        command = [sys.executable, "-c", _COUNT_NODES, self.address, str(count), str(seconds)]
        log = self.nodes[0].log
        wait_until(self._head_answers, "Ray's head", log, seconds)
        environment = clean_environment(self.folder / "count", **self.environment)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stderr[-3000:]}\n{log.read_text()[-3000:]}"
        alive: list[str] = json.loads(done.stdout.splitlines()[-1])  # Ray prints above it
        assert len(alive) == count, (alive, [node.log.read_text()[-2000:] for node in self.nodes])
        return alive

    def _head_answers(self) -> bool:
        head = self.nodes[0]
        assert head.process is None or head.process.poll() is None, head.log.read_text()[-3000:]
        return "Ray runtime started" in head.log.read_text()

    def kill(self, number: int) -> None:
        """As a lost machine: its raylet, all its workers and what they started, at once."""
        node = self.nodes[number]
        kill_part(node.folder)
        if node.process is not None:
            node.process.wait()
            node.process = None

    def close(self) -> None:
        kill_part(self.folder)
        for node in self.nodes:
            if node.process is not None:
                node.process.wait()
        shutil.rmtree(self.folder)


@pytest.fixture
def start_ray(parts: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., RayCluster]]:
    """A function that starts a cluster of so many nodes, with so many logical CPUs each."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is missing: run `make setup`")
    clusters: list[RayCluster] = []

    def start_ray(nodes: int = 2, cpus: int = 1, network: Network | None = None) -> RayCluster:
        cluster = RayCluster(parts / f"ray-{secrets.token_hex(2)}", network)
        clusters.append(cluster)
        cluster.add(cpus)
        cluster.wait(1)
        for _ in range(nodes - 1):
            cluster.add(cpus)
        cluster.wait(nodes)
        return cluster

    yield start_ray
    for cluster in clusters:
        cluster.close()


@pytest.fixture
def ray_cluster(start_ray: Callable[..., RayCluster]) -> RayCluster:
    """Two nodes with one logical CPU each."""
    return start_ray()


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
