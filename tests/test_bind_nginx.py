"""A real nginx under load while its configuration changes, and every tenth change is bad in one way or another."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import statistics
import threading
import time
from collections.abc import Iterator

import pytest
from support import need
from support.etcd_server import EtcdServer
from test_bind import Bound

PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
CONF = """# generation: {{getv "/lb/generation"}}
daemon off;
user root;
worker_processes 1;
pid PLACE/nginx.pid;
error_log stderr warn;
events {}
http {
    access_log off;
    client_body_temp_path PLACE/t1; proxy_temp_path PLACE/t2; fastcgi_temp_path PLACE/t3;
    uwsgi_temp_path PLACE/t4; scgi_temp_path PLACE/t5;
    server {
        listen 127.0.0.1:PORT;
        location / { return 200 "{{getv "/lb/generation"}}"; }
    }
{{with getv "/lb/extra" ""}}    server { listen 127.0.0.1:{{.}}; }{{end}}
    # {{atoi (getv "/lb/number" "1")}}
    {{getv "/lb/raw" ""}}
}
"""
# The listening socket outlives nginx: the test holds it and hands it over, as a socket holder of s6 does. So requests
# wait while nginx is gone. Whoever finds "poison" in the file ends nginx two seconds later.
RUN = """#!/usr/bin/python3 -IS
import os, signal, socket, time
link = socket.socket(socket.AF_UNIX)
link.connect("PLACE/holder")
_, fds, _, _ = socket.recv_fds(link, 1, 1)
link.close()
os.dup2(fds[0], 9)
os.set_inheritable(9, True)
nginx = os.getpid()
if not os.fork():
    os.closerange(3, 64)
    while os.getppid() == nginx:
        time.sleep(0.1)
        if "poison" in open("PLACE/nginx.conf").read():
            time.sleep(2)
            if os.getppid() == nginx and "poison" in open("PLACE/nginx.conf").read():
                os.kill(nginx, signal.SIGQUIT)
    os._exit(0)
os.execvpe("nginx", ["nginx", "-e", "stderr", "-c", "PLACE/nginx.conf"], {**os.environ, "NGINX": "9;"})
"""


class Balancer(Bound):
    """nginx in a container, its socket, and threads that ask it all the time."""

    def __init__(self, program: list[str], etcd: EtcdServer) -> None:
        need(shutil.which("nginx", path=PATH) and shutil.which("curl"), "nginx and curl")
        super().__init__(program, etcd)
        self.environ["PATH"] = PATH
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self.socket.getsockname()[1]
        self.taken = socket.create_server(("127.0.0.1", 0))  # who listens here cannot be joined
        self.place.chmod(0o755)
        work = self.place / "work"

        def fill(text: str) -> str:
            return text.replace("PLACE", str(work)).replace("PORT", str(self.port))

        self.write("services/nginx/run", fill(RUN))
        self.conf = self.resource(
            "nginx.conf", fill(CONF), keys=["/lb"], service="nginx", verify="3s",
            check_cmd="nginx -t -q -e stderr -c {{.src}}",
            verify_cmd=f'test "$(curl -s http://127.0.0.1:{self.port}/)" = '
                       '"$(sed -n \'s/^# generation: //p\' {{.dest}})"')
        self.done = threading.Event()
        self.answers, self.failures, self.slowest = 0, list[str](), 0.0
        self.holder = socket.socket(socket.AF_UNIX)
        self.holder.bind(str(work / "holder"))
        self.holder.listen()
        threading.Thread(target=self.hand_over, daemon=True).start()

    def hand_over(self) -> None:
        """Give the listening socket to whoever asks."""
        while not self.done.is_set():
            try:
                link, _ = self.holder.accept()
                socket.send_fds(link, [b"x"], [self.socket.fileno()])
                link.close()
            except OSError:
                return

    def get(self) -> str:
        """The generation that nginx serves; OSError or HTTPException if it does not."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", "/")
            answer = connection.getresponse()
            if answer.status != 200:
                raise http.client.HTTPException(f"status {answer.status}")
            return answer.read().decode()
        finally:
            connection.close()

    def ask(self) -> None:
        """Requests without end."""
        while not self.done.is_set():
            begin = time.monotonic()
            try:
                self.get()
                self.answers += 1
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(f"{time.time():.3f} {type(error).__name__} {error}")
            self.slowest = max(self.slowest, time.monotonic() - begin)
            time.sleep(0.005)

    def close(self) -> None:
        self.done.set()
        self.holder.close()
        super().close()
        self.socket.close()
        self.taken.close()


@pytest.fixture
def balancer(program: list[str], etcd35: EtcdServer) -> Iterator[Balancer]:
    made = Balancer(program, etcd35)
    yield made
    made.close()


def change_all_the_time(box: Balancer, changes: int) -> None:
    """So many changes, every tenth of them bad; what comes of each is looked at before the next."""
    bad = [  # key, value, what the log says then
        ("/lb/number", "x", "cannot render"),
        ("/lb/raw", "no directive", "Config check failed"),
        ("/lb/extra", str(box.taken.getsockname()[1]), "took back the change of nginx"),
        ("/lb/raw", "# poison", "it ended: exit code 0"),
    ]
    box.etcd.put("/lb/generation", "0")
    box.start()
    box.up("nginx")
    threads = [threading.Thread(target=box.ask, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    took: list[float] = []
    refused = 0
    for number in range(1, changes + 1):
        generation = f"g{number}"
        if number % 10:
            keys = [("/lb/number", "1"), ("/lb/raw", ""), ("/lb/extra", ""), ("/lb/generation", generation)]
            begin = time.monotonic()
            box.etcd.put_many(keys)
            while box.get() != generation:
                assert time.monotonic() < begin + 20, f"{generation} is not live: {box.text('log')[-3000:]}"
                time.sleep(0.002)
            took.append(time.monotonic() - begin)
            live = generation
            continue
        key, value, told = bad[number // 10 % len(bad)]
        before = box.text("log").count(told)
        box.etcd.put_many([(key, value), ("/lb/generation", generation)])
        box.says(told, times=before + 1)
        refused += 1
        deadline = time.monotonic() + 20
        while f"# generation: {live}\n" not in box.conf.read_text() or box.get() != live:
            assert time.monotonic() < deadline, f"not back on {live}: {box.text('log')[-3000:]}"
            time.sleep(0.01)
    box.done.set()
    for thread in threads:
        thread.join(30)
    took.sort()
    print(f"\n{changes} changes, {refused} of them bad; {box.answers} requests, {len(box.failures)} failed, slowest "
          f"{box.slowest:.3f} s; from put to live: p50 {statistics.median(took) * 1000:.0f} ms, "
          f"p99 {took[len(took) * 99 // 100] * 1000:.0f} ms, max {took[-1] * 1000:.0f} ms, "
          f"{sum(each <= 0.2 for each in took)} of {len(took)} within 200 ms")
    assert box.failures == [] and box.answers > changes
    assert box.status("nginx")["state"] == "up"


def test_no_request_fails_through_good_and_bad_changes(balancer: Balancer) -> None:
    change_all_the_time(balancer, 80)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_no_request_fails_through_five_hundred_changes(balancer: Balancer) -> None:
    change_all_the_time(balancer, 500)
