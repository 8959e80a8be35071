"""Starting `cispo serve` as a real process, for tests and for nobody else."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request

START = (
    "import sys, json; from cispo.server import ServeOptions, serve; from cispo.types import CispoError\n"
    "try: sys.exit(serve(ServeOptions(**json.loads(sys.argv[1]))))\n"
    "except CispoError as error: sys.exit(f'error: {error}')"
)


class Server:
    """One server process. `options` are those of `ServeOptions`; the port stays the same over restarts."""

    def __init__(self, state_dir, **options):
        self.options = {"state_dir": str(state_dir), "port": 0, "threads": 1, **options}
        self.key = None
        self.lines = []
        self.process = None

    def start(self, preexec=None):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(self.options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            preexec_fn=preexec,
        )
        for line in self.process.stdout:
            self.lines.append(line)
            if "TINKER_BASE_URL=" in line:
                self.url = line.split("=", 1)[1].strip()
                self.options["port"] = int(self.url.rsplit(":", 1)[1])
                break
        else:
            raise RuntimeError("the server did not start:\n" + "".join(self.lines))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)
            if "TINKER_API_KEY=" in line:
                self.key = line.split("=", 1)[1].strip()

    def wait_for_key(self):
        deadline = time.monotonic() + 10
        while self.key is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.key

    def kill(self):
        """SIGKILL: no chance to write anything."""
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def stop(self):
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()
        self._reader.join()
        return self.process.returncode

    def request(self, method, path, body=None, *, key=None, headers=None):
        """Status and body of one plain HTTP request."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"X-API-Key": key or self.key or "", "Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.url + path, data, sent, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def result(self, request_id, *, key=None):
        """The JSON result of a future."""
        status, data = 408, b""
        while status == 408:
            status, data = self.request("POST", "/api/v1/retrieve_future", {"request_id": request_id}, key=key)
        assert status == 200, (status, data)
        return json.loads(data)


@contextlib.contextmanager
def serving(state_dir, **options):
    server = Server(state_dir, **options).start()
    try:
        server.wait_for_key()
        yield server
    finally:
        server.stop()


def datums(count, seed, length=12):
    """Random rows for a loss with advantages."""
    import torch
    from tinker import types

    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        ids = torch.randint(0, 14, (length + 1,), generator=g)
        out.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(ids[:-1].tolist()),
                loss_fn_inputs={
                    "target_tokens": types.TensorData.from_torch(ids[1:]),
                    "logprobs": types.TensorData.from_torch(-2.0 - torch.rand(length, generator=g)),
                    "advantages": types.TensorData.from_torch(torch.randn(length, generator=g)),
                },
            )
        )
    return out


def client_of(server):
    """The real SDK's way in."""
    import tinker

    return tinker.ServiceClient(base_url=server.url, api_key=server.key)
