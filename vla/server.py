"""Serve a policy over a websocket, in the protocol of openpi's client (messages are msgpack, arrays as raw bytes).

Run:
  python vla/server.py --checkpoint runs/robot/checkpoints/best --port 8000
  python vla/server.py --checkpoint CKPT --policy pi05_finetune/policy.py --image-key front=observation/image

On the robot (pip install openpi-client):
  client = openpi_client.websocket_client_policy.WebsocketClientPolicy("HOST", 8000)
  actions = client.infer({"observation/image": image, "observation/state": state, "prompt": text})["actions"]  # (H, A)

A request that cannot be answered gets an error as text, which openpi's client raises; the connection stays. GET
/healthz answers OK. --policy FILE has a class Policy like that of policy.py beside this file: from_pretrained(folder,
device=), state_dim, reset([text]), predict([image], [state]) -> (1, H, A), ValueError for what it cannot act on. The
image is an array, or with --image-key CAMERA=KEY a dict of cameras. Nothing is unpickled.
"""

import collections
import http
import importlib
import sys
import threading
import time
from pathlib import Path
from sys import path as search_path

import numpy as np
import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import common

LIMIT = 64 * 2**20  # bytes of a request: a few camera images
REPORT_EVERY = 100  # requests between two lines about latency
KINDS = "biuf"  # dtypes that an array may have: no objects, no records
HERE = Path(__file__).resolve().parent


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a checkpoint of finetune.py, or what --policy loads")
    add("--policy", default=str(HERE / "policy.py"), metavar="FILE", help="python file with a class Policy")
    add("--host", default="127.0.0.1", metavar="NAME", help="0.0.0.0 lets other machines in; there is no password")
    add("--port", type=int, default=8000, metavar="N", help="0 takes a free one")
    images = "of the request: uint8 (H, W, 3); CAMERA=KEY for a policy of several cameras"
    add("--image-key", nargs="+", default=["observation/image"], metavar="KEY", help=images)
    add("--state-key", default="observation/state", metavar="KEY", help="of the request: (S,), if the policy reads it")
    add("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    return parser.parse_args(argv)


# --- messages


def pack(message):
    """bytes of a message: maps, lists, text, numbers, numpy arrays and scalars."""
    import msgpack

    def encode(value):
        if isinstance(value, np.ndarray) and value.dtype.kind in KINDS:
            data = np.ascontiguousarray(value).tobytes()
            return {b"__ndarray__": True, b"data": data, b"dtype": value.dtype.str, b"shape": value.shape}
        if isinstance(value, np.generic) and value.dtype.kind in KINDS:
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        raise ValueError(f"a {type(value).__name__} cannot be sent")

    return msgpack.packb(message, default=encode)


def unpack(data):
    """The message of `data`; ValueError for what is not one."""
    import msgpack

    def decode(value):
        if b"__ndarray__" in value or b"__npgeneric__" in value:
            dtype = np.dtype(value[b"dtype"])
            if dtype.kind not in KINDS:
                raise ValueError(f"an array of {dtype} is not accepted")
            if b"__npgeneric__" in value:
                return dtype.type(value[b"data"])
            return np.frombuffer(value[b"data"], dtype).reshape(value[b"shape"])
        return value

    try:
        return msgpack.unpackb(data, object_hook=decode)
    except Exception as error:  # what a client sends can break msgpack and numpy in a dozen ways
        raise ValueError(f"not a message: {type(error).__name__} {error}") from None


# --- policies


def load_policy(file, checkpoint, device):
    """The Policy of a python file, which imports its own folder's modules."""
    file = Path(file).resolve()
    if not file.is_file() or file.suffix != ".py":
        raise common.DataError(f"--policy {file}: not a python file")
    search_path[0] = str(file.parent)  # in the place of this folder
    return importlib.import_module(file.stem).Policy.from_pretrained(checkpoint, device=device)


def answer_with(policy, image_keys, state_key):
    """A function from a request to a chunk of actions (H, A) in robot units."""
    cameras = dict(key.split("=", 1) for key in image_keys if "=" in key)

    def infer(request):
        prompt = request["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError("prompt must be a text")
        image = {camera: request[key] for camera, key in cameras.items()} or request[image_keys[0]]
        policy.reset([prompt])
        return policy.predict([image], [request[state_key]] if policy.state_dim else None)[0]

    return infer


# --- the server


class Server:
    """server = Server(infer, metadata, host, port); server.run() until server.close(). One request at a time.

    infer: request (dict) -> actions (H, A). metadata (dict) is the first message of every connection.
    """

    def __init__(self, infer, metadata, host="127.0.0.1", port=8000, say=print):
        try:
            import msgpack  # noqa: F401  used by pack and unpack
            from websockets.sync.server import serve
        except ImportError as error:
            raise common.DataError(f"{error}: pip install websockets msgpack") from None
        self.infer, self.metadata, self.lock = infer, metadata, threading.Lock()
        self.times, self.count, self.say = collections.deque(maxlen=1000), 0, say
        try:
            more = dict(process_request=self.health, compression=None, max_size=LIMIT)
            self.server = serve(self.handle, host, port, **more)
        except OSError as error:
            raise common.DataError(f"--host {host} --port {port}: {error.strerror or error}") from None
        self.port = self.server.socket.getsockname()[1]

    @staticmethod
    def health(connection, request):
        return connection.respond(http.HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None

    def handle(self, connection):
        """Answer a connection's requests until it is closed."""
        connection.send(pack(self.metadata))
        for data in connection:
            start = time.perf_counter()
            try:
                answer = pack(self.answer(data, start))
            except KeyError as error:
                answer = f"bad request: it has no {error}"
            except (ValueError, TypeError) as error:
                answer = f"bad request: {error}"
            except Exception as error:  # a fault of the policy: printed, sent to the client, and the server goes on
                self.say(f"error: {type(error).__name__}: {error}")
                answer = f"the policy failed: {type(error).__name__}: {error}"
            connection.send(answer)

    def answer(self, data, start):
        request = unpack(data)
        if not isinstance(request, dict):
            raise ValueError(f"a map is expected, not a {type(request).__name__}")
        with self.lock, torch.no_grad():
            begun = time.perf_counter()
            actions = np.asarray(self.infer(request), np.float32)
            end = time.perf_counter()
            self.times.append(end - start)
            self.count += 1
            if self.count % REPORT_EVERY == 0:
                self.say(self.latency())
        timing = dict(infer_ms=1e3 * (end - begun), wait_ms=1e3 * (begun - start))
        return dict(actions=actions, server_timing=timing)

    def latency(self):
        """One line about the requests so far."""
        median, slow = 1e3 * np.quantile(self.times, [0.5, 0.95]) if self.times else (0, 0)
        return f"{self.count} requests answered, {median:.1f} ms in the median, 95 % below {slow:.1f} ms"

    def run(self):
        self.server.serve_forever()

    def close(self):
        self.server.shutdown()


def main(argv=None):
    args = parse(argv)
    infer = answer_with(load_policy(args.policy, args.checkpoint, args.device), args.image_key, args.state_key)
    server = Server(infer, dict(checkpoint=args.checkpoint), args.host, args.port)
    print(f"serving {args.checkpoint} on ws://{args.host}:{server.port}", flush=True)
    try:
        server.run()
    except KeyboardInterrupt:
        server.close()
    print(server.latency())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
