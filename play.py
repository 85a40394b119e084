"""A page to play with: draw, see the set of tokens and its counts, change them, and watch generation (Sec. 3).

    python play.py                                  the model in this repository, in the browser
    python play.py --ckpt fsdd.pt --port 8000 --no_browser

The page is play.html. The server answers only this page, on this machine, and writes nothing. Ctrl-C ends it.
"""
import base64
import json
import webbrowser
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from beyond import flip_times
from data import open_dataset
from dual_transform import counts_to_tokens, tokens_to_counts
from fsdd import greedy_adjust, sampling_times
from sample import NOISES, default_checkpoint, load, make_sampler
from support.command_line import Parser, parse_as
from support.seeds import generator
from support.training import run

CALLS = ("test", "encode", "decode", "adjust", "generate")  # the methods of Model that the page can call
MAX_BODY = 2 ** 23  # bytes of a request
# The page loads nothing from elsewhere, and no other site can show it in a frame.
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
          "connect-src 'self'; frame-ancestors 'none'")


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--ckpt", default=default_checkpoint(), help="checkpoint of train_fsdd.py (%(default)s)")
    parser.add_argument("--port", type=parse_as(int, "[0, 65536)"), default=0, help="on 127.0.0.1; 0: a free one (0)")
    parser.add_argument("--no_browser", action="store_true", help="only print the page's address")
    args = parser.parse_args(argv)
    server = make_server(args.ckpt, args.port)
    print(f"{args.ckpt}: http://{server.host}/ (Ctrl-C ends it)", flush=True)
    if not args.no_browser:
        webbrowser.open(f"http://{server.host}/")
    with suppress(KeyboardInterrupt):
        server.serve_forever()


def make_server(ckpt, port=0):
    """A server for a checkpoint of train_fsdd.py; serve_forever() starts it. OSError if the port is taken."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.host = f"127.0.0.1:{server.server_port}"
    server.model = Model(ckpt, "cuda" if torch.cuda.is_available() else "cpu")
    return server


class Model:
    """What the page can ask for. A call takes a dict, the request, and yields one or more dicts."""

    def __init__(self, ckpt, device):
        self.denoiser, self.tokenizer, checkpoint = load(ckpt, torch.device(device))
        self.settings, self.device = checkpoint["generation"], device
        self.noise = NOISES[self.settings["prior"]]
        self.M, self.C = self.tokenizer.num_tokens, self.tokenizer.codebook_size
        self.codes = self.denoiser.codebook_size  # C, or C + 1 with the mask code
        self.tests, data = [], checkpoint.get("config", {}).get("data")
        if data:
            with suppress(ValueError):  # the model was trained on a folder that is not here
                self.tests = open_dataset(data, "test", self.tokenizer.image_size)
        self.facts = {"ckpt": ckpt, "size": self.tokenizer.image_size, "channels": self.tokenizer.channels,
                      "M": self.M, "C": self.C, "masked": self.codes > self.C, "digits": data == "digits",
                      "tests": len(self.tests), "classes": checkpoint["class_names"], **self.settings}  # for the page

    def test(self, request):
        """number, of a test image -> the image."""
        images, _ = self.tests.__getitems__([(request["number"], 0)])  # (1, ch, H, W) uint8
        yield {"image": pack(images / 127.5 - 1)}

    def encode(self, request):
        """pixels, (H, W, ch) in [0, 255] as one list -> the tokens in ascending order."""
        size, channels = self.tokenizer.image_size, self.tokenizer.channels
        pixels = torch.tensor(request["pixels"], device=self.device).view(1, size, size, channels)
        tokens = self.tokenizer.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1)  # (1, M)
        yield {"tokens": tokens[0].sort().values.tolist()}

    def decode(self, request):
        """tokens, any number of them -> the image."""
        yield {"image": pack(self.tokenizer.decode(self.tokens(request)))}

    @torch.no_grad()
    def adjust(self, request):
        """tokens, any number n of them -> M tokens, by Algorithm 1 with the denoiser's probabilities.

        The denoiser reads states that sum to M. So it gets M of the tokens if there are more; if there are fewer, noise
        stands for the missing ones. The probabilities are the mean over 16 such states.
        """
        tokens, random = self.tokens(request), generator(self.device, "adjust", 0)
        n, M = tokens.shape[1], self.M
        order = torch.rand(16, n, generator=random, device=self.device).argsort(1)
        state = tokens_to_counts(tokens[0, order[:, :M]], self.codes)  # (16, codes)
        state += self.noise.sample_noise(16, self.codes, max(M - n, 0), self.settings["prior"], random, self.device)
        share = torch.full((16,), abs(M - n) / max(M, n), device=self.device)
        labels = torch.full((16,), self.denoiser.num_classes, device=self.device)
        p = self.denoiser(state, share if self.codes > self.C else flip_times(share), labels).softmax(2)
        log_p = p.mean(0, keepdim=True)[:, :self.C].log()  # (1, C, M + 1)
        counts = tokens_to_counts(tokens, self.C)
        counts = greedy_adjust(counts, lambda k: log_p.gather(2, k[:, :, None])[:, :, 0], M)
        yield {"tokens": counts_to_tokens(counts)[0].tolist()}

    def generate(self, request):
        """label, steps, guidance, seed, t in [0, 1], tokens -> for every state its time, counts and image.

        Generation starts at time t between the tokens (0), of which there must be M then, and noise (1).
        """
        steps, t = int(request["steps"]), float(request["t"])
        refine = make_sampler(self.settings | {"steps": steps, "guidance": request["guidance"]})
        random = generator(self.device, "play", int(request["seed"]))
        x = self.noise.sample_noise(1, self.codes, self.M, self.settings["prior"], random, self.device)  # X_1
        if t < 1:
            x0 = tokens_to_counts(self.tokens(request), self.codes)
            if x0.sum() != self.M:
                raise ValueError(f"to start from the set, it must have {self.M} tokens, not {x0.sum()}")
            uniform = torch.rand(x.shape, generator=random, device=self.device)
            x = self.noise.forward_process(x0, x, torch.tensor([t], device=self.device), uniform)  # X_t
        times = [t] + [s for s in sampling_times(steps, self.settings["times"]) if s < t]
        labels = torch.tensor([int(request["label"])], device=self.device)
        for t, x in zip(times, refine(self.denoiser, labels, generator=random, start=(x, t)), strict=True):
            image = self.tokenizer.decode(counts_to_tokens(x[:, :self.C]))
            yield {"t": t, "states": len(times), "counts": x[0].tolist(), "image": pack(image)}

    def tokens(self, request):
        return torch.tensor([request["tokens"]], dtype=torch.int64, device=self.device)  # (1, n)


def pack(images):
    """Images (1, ch, H, W) in [-1, 1] -> their numbers as float32, in base64."""
    return base64.b64encode(images.float().cpu().contiguous().numpy().tobytes()).decode()


class Handler(BaseHTTPRequestHandler):
    """GET /: the page. POST /CALL: a call of Model, a line of JSON for each dict, sent when it is there.

    Another site open in the browser could send requests here. Its Origin differs, and if it has pointed its own name at
    127.0.0.1, so does Host.
    """

    def do_GET(self):
        if self.path != "/" or self.headers["Host"] != self.server.host:
            return self.answer(400, "text/plain", f"the page is at http://{self.server.host}/")
        facts = json.dumps(self.server.model.facts).replace("<", "\\u003c")  # no name ends the script
        page = Path(__file__).with_name("play.html").read_text(encoding="utf-8")
        self.answer(200, "text/html", page.replace("const model = {}", f"const model = {facts}"))

    def do_POST(self):
        try:
            host = self.server.host
            if self.headers["Host"] != host or self.headers["Origin"] != f"http://{host}":
                raise ValueError("only the page itself may ask")
            if not 0 <= (length := int(self.headers["Content-Length"])) <= MAX_BODY:
                raise ValueError(f"requests have at most {MAX_BODY} bytes")
            if self.path[1:] not in CALLS:
                raise ValueError("there is no such call")
            call, request = getattr(self.server.model, self.path[1:]), json.loads(self.rfile.read(length))
            lines = (json.dumps(answer) + "\n" for answer in call(request))
            first = next(lines)
        except Exception as problem:  # a bad request can fail anywhere
            return self.answer(400, "text/plain", f"{self.path} can't be answered: {problem}".splitlines()[0])
        with suppress(ConnectionError):  # the page may not wait for the rest
            self.answer(200, "application/x-ndjson", first)
            for line in lines:
                self.wfile.write(line.encode())

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
