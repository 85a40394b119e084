"""The images of sample.py on their way to its --out: into a file as they are made, so that memory holds a few of them
and an interrupted run can be continued."""
import hashlib
import os
import sys
import zipfile

import numpy as np
import torch

import common
from data import files
from data.pictures import draw_samples


class SampleFile:
    """Used by all ranks; rank 0 writes.

    While images are made they stand, as bytes, in a file beside --out, whose name holds a hash of all that the images
    depend on: the same command finds it and continues after its last whole chunk. At the end --out is written beside it
    and renamed. ValueError where another run makes the same images.
    """

    def __init__(self, args, labels, checkpoint, settings, device):
        """args: of sample.parse().  labels: (N,).  settings: of fsdd.refine()."""
        self.args, self.labels, self.class_names = args, labels, checkpoint["class_names"]
        size = checkpoint["tokenizer"]["model_config"]
        frames = settings["steps"] + 1 if args.out.endswith(".gif") else 1
        self.shape = (frames, size["channels"], size["image_size"], size["image_size"])  # of one image
        made_from = repr((self.shape, labels.tolist(), settings, args.seed, args.batch, args.bf16, str(device)))
        made_from = hashlib.sha256(made_from.encode())
        for weights in (checkpoint["weights"], checkpoint["tokenizer"]["weights"]):
            for name, weight in weights.items():
                made_from.update(name.encode() + weight.numpy().tobytes())
        self.partial = f"{args.out}.{made_from.hexdigest()[:12]}.partial"
        self.done = common.all_gather(common.on_every_rank(self.open))[0]  # chunks that are there

    def open(self):
        if not common.is_main():
            return 0
        self.file = open(self.partial, "a+b")
        try:
            files.lock(self.file)  # held until this process ends
        except BlockingIOError:
            raise ValueError(f"another run makes the same images ({self.partial}); wait for it, or end it") from None
        held, N = os.path.getsize(self.partial) // np.prod(self.shape), len(self.labels)
        done = -(-N // self.args.batch) if held >= N else held // self.args.batch
        self.file.truncate(min(N, done * self.args.batch) * np.prod(self.shape))
        if done:
            print(f"continuing after the {min(N, done * self.args.batch)} images in {self.partial}", flush=True)
        return int(done)

    def add(self, found):
        """Append the next chunks: found[rank] is a list of none or one, images (frames, n, ch, H, W) uint8."""
        for chunk in sum(found, []) if common.is_main() else ():
            with files.naming(self.partial):
                self.file.write(chunk.transpose(0, 1).numpy().tobytes())  # image by image
                self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if not common.is_main():
            return
        if kind is None:
            self.write_out()
        elif held := os.path.getsize(self.partial) // np.prod(self.shape):
            print(f"\n{held} of {len(self.labels)} images are kept in {self.partial}; the same command continues "
                  "from them", file=sys.stderr, flush=True)
        else:
            os.remove(self.partial)
        self.file.close()

    def write_out(self):
        with files.written(self.args.out) as out:
            self.write_arrays(out) if self.args.out.endswith(".npz") else self.write_picture(out)
        os.remove(self.partial)

    def read(self, part):
        """A slice of the images, (n, frames, ch, H, W) uint8."""
        size = int(np.prod(self.shape))
        self.file.seek(part.start * size)
        return np.frombuffer(self.file.read((part.stop - part.start) * size), np.uint8).reshape(-1, *self.shape)

    def write_arrays(self, out):
        """ADM's sample batch: arr_0 uint8 (N, H, W, 3) and arr_1 the labels."""
        N, (_, _, H, W) = len(self.labels), self.shape
        with zipfile.ZipFile(out, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (N, H, W, 3)}
                np.lib.format.write_array_header_1_0(member, header)
                for part in common.chunks(slice(0, N), max(1, 2 ** 20 // (H * W))):
                    arrays = self.read(part)[:, -1].transpose(0, 2, 3, 1)  # (n, H, W, ch)
                    member.write(np.broadcast_to(arrays, (*arrays.shape[:3], 3)).tobytes())
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, self.labels.numpy())

    def write_picture(self, out):
        """A grid (.png) or an animation (.gif), a row for each class."""
        images = torch.from_numpy(self.read(slice(0, len(self.labels))).swapaxes(0, 1).copy())
        draw_samples(out, self.args.out[-3:], images, self.labels, self.class_names)
