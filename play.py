"""A page to play with: draw, see the set of tokens and its counts, change them, and watch generation (Sec. 3).

    python play.py                                  the model in this repository, in the browser
    python play.py --ckpt fsdd.pt --port 8000 --no_browser

The page is play.html. Only the page itself, on this machine, is answered, and nothing is written. Ctrl-C ends it.
"""
import base64
import contextlib
import json
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from beyond import flip_times
from data import open_dataset
from dual_transform import counts_to_tokens, tokens_to_counts
from fsdd import greedy_adjust, refine, uniform_times
from generation import PROCESS, default_checkpoint, load, refine_arguments
from support.command_line import Parser, checked
from support.seeds import generator
from support.training import run

MAX_BODY = 2 ** 22  # bytes of a request
# The page loads nothing from elsewhere, and no other site can show it in a frame.
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
          "connect-src 'self'; frame-ancestors 'none'")


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--ckpt", default=default_checkpoint(), help="checkpoint of train_fsdd.py (%(default)s)")
    parser.add_argument("--port", type=checked(int, "[0, 65536)"), default=0, help="on 127.0.0.1; 0: a free one (0)")
    parser.add_argument("--no_browser", action="store_true", help="only print the page's address")
    args = parser.parse_args(argv)
    server = make_server(args.ckpt, args.port)
    address = f"http://127.0.0.1:{server.server_port}/"
    print(f"{args.ckpt}: {address} (Ctrl-C ends it)", flush=True)
    if not args.no_browser:
        webbrowser.open(address)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


def make_server(ckpt, port=0):
    """A server for a checkpoint of train_fsdd.py; serve_forever() starts it. OSError if the port is taken."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.calls = Calls(ckpt, "cuda" if torch.cuda.is_available() else "cpu")
    return server


class Calls:
    """What the page asks for. A call takes a request and yields the lines of its answer, all of them dicts."""

    def __init__(self, ckpt, device):
        self.denoiser, self.tokenizer, checkpoint = load(ckpt, torch.device(device))
        self.settings, self.device = checkpoint["generation"], device
        self.noise, self.process = PROCESS[self.settings["prior"]]
        tokenizer, data = self.tokenizer, checkpoint.get("config", {}).get("data", "")
        try:
            self.tests = open_dataset(data, "test", tokenizer.image_size)
        except ValueError:  # the model was trained on a folder that is not here
            self.tests = []
        # Sizes and names, for the page. If masked, the denoiser has one more code than the tokenizer, the mask code.
        self.facts = {"ckpt": ckpt, "size": tokenizer.image_size, "channels": tokenizer.channels,
                      "M": tokenizer.num_tokens, "C": tokenizer.codebook_size, "tests": len(self.tests),
                      "masked": self.denoiser.codebook_size > tokenizer.codebook_size, "digits": data == "digits",
                      "classes": checkpoint["class_names"], "guidance": self.settings["guidance"],
                      "steps": self.settings["steps"]}

    def encode(self, request):
        """test, the number of a test image, or pixels, (H, W, ch) bytes in base64 -> the tokens, and both images."""
        size, channels = self.tokenizer.image_size, self.tokenizer.channels
        if "test" in request:
            images, _ = self.tests.__getitems__([(request["test"], 0)])  # (1, ch, H, W) uint8
        else:
            pixels = torch.frombuffer(bytearray(base64.b64decode(request["pixels"])), dtype=torch.uint8)
            images = pixels.view(1, size, size, channels).permute(0, 3, 1, 2)
        images = images.to(self.device) / 127.5 - 1
        tokens = self.tokenizer.encode(images)  # (1, M)
        yield {"tokens": tokens[0].tolist(), "original": pack(images), "image": pack(self.tokenizer.decode(tokens))}

    def decode(self, request):
        """sets, lists of equally many codes -> an image of each."""
        yield {"images": pack(self.tokenizer.decode(torch.tensor(request["sets"], device=self.device).long()))}

    @torch.no_grad()
    def adjust(self, request):
        """tokens, any number n of them -> M tokens, by Algorithm 1 with the denoiser's probabilities.

        The denoiser reads states that sum to M. So it gets M of the tokens if there are more; if there are fewer, noise
        stands for the missing ones. The probabilities are the mean over 16 such states.
        """
        tokens = torch.tensor(request["tokens"], device=self.device).long()  # (n,)
        n, M, C = len(tokens), self.denoiser.num_tokens, self.denoiser.codebook_size
        random = generator(self.device, "adjust", 0)
        kept = tokens[torch.rand(16, n, generator=random, device=self.device).argsort(1)[:, :M]]  # (16, M or n)
        noise = self.noise(16, C, M - kept.shape[1], self.settings["prior"], random, self.device)
        share = torch.full((16,), abs(M - n) / max(M, n), device=self.device)
        t = share if self.facts["masked"] else flip_times(share)
        labels = torch.full((16,), self.denoiser.num_classes, device=self.device)
        p = self.denoiser(tokens_to_counts(kept, C) + noise, t, labels).softmax(2).mean(0, keepdim=True)
        log_p = p[:, :self.facts["C"]].log()  # (1, C, M + 1)
        x = tokens_to_counts(tokens[None], self.facts["C"])
        x = greedy_adjust(x, lambda k: log_p.gather(2, k[:, :, None])[:, :, 0], M)
        yield {"tokens": counts_to_tokens(x)[0].tolist()}

    def generate(self, request):
        """label, steps, guidance, seed, t in [0, 1], tokens -> a line for every state: its time, counts and image.

        Generation starts at time t between the tokens (0), of which there must be M then, and noise (1).
        """
        M, C = self.denoiser.num_tokens, self.denoiser.codebook_size
        steps, t = int(request["steps"]), float(request["t"])
        settings = refine_arguments(self.settings | {"steps": steps, "guidance": request["guidance"]})
        random = generator(self.device, "play", int(request["seed"]))
        x = self.noise(1, C, M, self.settings["prior"], random, self.device)  # X_1
        if t < 1:
            if len(request["tokens"]) != M:
                raise ValueError(f"to start from the set, it must have {M} tokens, but it has {len(request['tokens'])}")
            x0 = tokens_to_counts(torch.tensor([request["tokens"]], device=self.device), C)
            uniform = torch.rand(x.shape, generator=random, device=self.device)
            x = self.process(x0, x, torch.tensor([t], device=self.device), uniform)  # X_t
        times = [t] + [s for s in settings.get("times", uniform_times)(steps) if s < t]
        labels = torch.tensor([int(request["label"])], device=self.device)
        for t, x in zip(times, refine(self.denoiser, labels, **settings, generator=random, start=(x, t))):
            image = self.tokenizer.decode(counts_to_tokens(x[:, :self.facts["C"]]))
            yield {"t": t, "states": len(times), "counts": x[0].tolist(), "image": pack(image)}


def pack(images):
    """Images in [-1, 1] -> their numbers as float32, in base64."""
    return base64.b64encode(images.float().cpu().contiguous().numpy().tobytes()).decode()


class Handler(BaseHTTPRequestHandler):
    """GET /: the page. POST /CALL: a call, whose lines are sent as they come."""

    def do_GET(self):
        if self.path == "/" and self.is_own():
            page = Path(__file__).with_name("play.html").read_text(encoding="utf-8")
            facts = json.dumps(self.server.calls.facts).replace("<", "\\u003c")  # no name ends the script
            self.answer(200, "text/html", page.replace("const model = {}", f"const model = {facts}"))
        else:
            self.answer(400, "text/plain", "there is nothing here but the page")

    def do_POST(self):
        try:
            if not self.is_own() or self.headers["Origin"] != f"http://{self.headers['Host']}":
                raise ValueError("only the page itself may ask")
            if not 0 <= (length := int(self.headers["Content-Length"])) <= MAX_BODY:
                raise ValueError(f"requests have at most {MAX_BODY} bytes")
            calls = self.server.calls
            calls = {"/" + call.__name__: call for call in (calls.encode, calls.decode, calls.adjust, calls.generate)}
            lines = map(json.dumps, calls[self.path](json.loads(self.rfile.read(length))))
            first = next(lines)
        except Exception as problem:  # a bad request can fail anywhere
            self.answer(400, "text/plain", f"{self.path} can't be answered: {problem}".splitlines()[0])
            return
        with contextlib.suppress(ConnectionError):  # the page may not wait for the rest
            self.answer(200, "application/x-ndjson", first + "\n")
            for line in lines:
                self.wfile.write(line.encode() + b"\n")

    def is_own(self):
        """Whether the address in the browser is this server's. Another name that leads here may be another site's."""
        return self.headers["Host"] in [f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")]

    def answer(self, status, kind, text):
        self.send_response(status)
        self.send_header("Content-Type", kind + "; charset=utf-8")
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        """Do not print every request."""


if __name__ == "__main__":
    run(main)
