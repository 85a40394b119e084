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
from fsdd import greedy_adjust, sampling_times
from sample import NOISES, default_checkpoint, load, make_sampler
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
        self.settings, self.device, tokenizer = checkpoint["generation"], device, self.tokenizer
        self.prior = self.settings["prior"]
        self.noise = NOISES[self.prior]
        self.M, self.C, self.codes = tokenizer.num_tokens, tokenizer.codebook_size, self.denoiser.codebook_size
        self.masked = self.codes > self.C  # the denoiser has one more code than the tokenizer, the mask code
        data = checkpoint.get("config", {}).get("data", "")
        try:
            self.tests = open_dataset(data, "test", tokenizer.image_size)
        except ValueError:  # the model was trained on a folder that is not here
            self.tests = []
        self.facts = {"ckpt": ckpt, "size": tokenizer.image_size, "channels": tokenizer.channels, "M": self.M,
                      "C": self.C, "masked": self.masked, "digits": data == "digits", "tests": len(self.tests),
                      "classes": checkpoint["class_names"], "steps": self.settings["steps"],
                      "guidance": self.settings["guidance"]}  # for the page

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
        n, M, random = len(tokens), self.M, generator(self.device, "adjust", 0)
        kept = tokens[torch.rand(16, n, generator=random, device=self.device).argsort(1)[:, :M]]  # (16, n or M)
        noise = self.noise.sample_noise(16, self.codes, M - kept.shape[1], self.prior, random, self.device)
        share = torch.full((16,), abs(M - n) / max(M, n), device=self.device)
        t = share if self.masked else flip_times(share)
        labels = torch.full((16,), self.denoiser.num_classes, device=self.device)
        state = tokens_to_counts(kept, self.codes) + noise  # (16, codes), every row sums to M
        p = self.denoiser(state, t, labels).softmax(2)  # (16, codes, M + 1)
        log_p = p.mean(0, keepdim=True)[:, :self.C].log()
        x = tokens_to_counts(tokens[None], self.C)
        x = greedy_adjust(x, lambda k: log_p.gather(2, k[:, :, None])[:, :, 0], M)
        yield {"tokens": counts_to_tokens(x)[0].tolist()}

    def generate(self, request):
        """label, steps, guidance, seed, t in [0, 1], tokens -> a line for every state: its time, counts and image.

        Generation starts at time t between the tokens (0), of which there must be M then, and noise (1).
        """
        steps, t = int(request["steps"]), float(request["t"])
        refine = make_sampler(self.settings | {"steps": steps, "guidance": request["guidance"]})
        random = generator(self.device, "play", int(request["seed"]))
        x = self.noise.sample_noise(1, self.codes, self.M, self.prior, random, self.device)  # X_1
        if t < 1:
            tokens = torch.tensor([request["tokens"]], device=self.device)
            if tokens.shape[1] != self.M:
                raise ValueError(f"to start from the set, it must have {self.M} tokens, not {tokens.shape[1]}")
            x0 = tokens_to_counts(tokens, self.codes)
            uniform = torch.rand(x.shape, generator=random, device=self.device)
            x = self.noise.forward_process(x0, x, torch.tensor([t], device=self.device), uniform)  # X_t
        times = [t] + [s for s in sampling_times(steps, self.settings["times"]) if s < t]
        labels = torch.tensor([int(request["label"])], device=self.device)
        for t, x in zip(times, refine(self.denoiser, labels, generator=random, start=(x, t))):
            image = self.tokenizer.decode(counts_to_tokens(x[:, :self.C]))
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
