"""Stage 2: train Fixed-Sum Discrete Diffusion on the token sets of stage 1 (Sec. 3.3, 4.1). tokenizer.pt -> fsdd.pt

    python train_fsdd.py                          after train_tokenizer.py
    torchrun --nproc_per_node=8 train_fsdd.py     eight processes, the same training
    python train_fsdd.py --resume                 go on where a run was cut off

Every training image is encoded once (tokens.npy, kept for the next run with the same tokenizer and images); from then on
no image is read. Writes fsdd.pt (weights, their moving average, the tokenizer: all that sample.py needs, and all that
--resume needs), fsdd.csv (a log) and fsdd.png (samples). On the digits: 5 minutes on two CPU cores (README.md).
"""
import hashlib
import os
import time

import numpy as np
import torch
from tqdm import tqdm

import common
from data.reading import batch_indices, in_order, open_datasets
from dual_transform import counts_to_tokens, sequence_bits, set_bits, tokens_to_counts
from fsdd import Denoiser, fsdd_loss, generate, sample_noise, sample_times
from sample import check_sampling, decode, gather
from tokenizer import SetTokenizer

MODELS = {  # width, layers, heads of the denoiser
    "digits": (128, 4, 4),
    "S": (384, 12, 6),   # 36.0 million parameters with the paper's C = 4096, M = 128
    "B": (768, 12, 12),  # 136.7 million
}
HYPERPARAMETERS = [
    # name               digits          imagenet256      meaning
    ("tokenizer",        "tokenizer.pt", "tokenizer.pt",  "checkpoint of stage 1"),
    ("data",             "digits",       "data/imagenet", "digits, or a folder that holds train/CLASS/* and val/CLASS/*"),
    ("flip",             False,          True,            "learn from mirrored images too"),
    # noise and denoiser
    ("prior",            "multinomial",  "multinomial",   "X_1: multinomial (the paper) or distinct (the authors' release)"),
    ("model",            "digits",       "S",             "size of the denoiser: digits, S or B, see MODELS"),
    ("width",            0,              0,               "its width, 0 = the model's"),
    ("layers",           0,              0,               "its blocks, 0 = the model's"),
    ("heads",            0,              0,               "its attention heads, 0 = the model's"),
    ("unused_rows",      False,          True,            "C + 1 rows for M + 1 counts, as in the paper's number of parameters"),
    ("times",            "flips",        "uniform",       "density of t: uniform (the paper) or flips, see fsdd.sample_times()"),
    ("gelu",             "none",         "tanh",          "GELU: tanh (DiT) or none, the exact one, which is faster on CPUs"),
    ("label_drop",       0.1,            0.1,             "share of labels replaced by the null class, for guidance"),
    # optimization
    ("steps",            1200,           1000000,         "optimizer steps"),
    ("batch_size",       128,            256,             "images a step, over all processes"),
    ("device_batch",     128,            32,              "images a process takes at once; more are accumulated"),
    ("optimizer",        "muon",         "adamw",         "adamw, or muon for the blocks' matrices and adamw for the rest"),
    ("lr",               2e-3,           1e-4,            "peak learning rate of adamw"),
    ("muon_lr",          1e-2,           1e-3,            "peak learning rate of muon"),
    ("lr_end",           0.01,           1.0,             "learning rate at the end, a share of the peak (cosine); 1 = constant"),
    ("warmup",           50,             0,               "steps of linear warm-up"),
    ("beta2",            0.99,           0.999,           "second beta of adamw"),
    ("weight_decay",     0.01,           0.01,            "on all weights, as the authors' release (PyTorch's default)"),
    ("clip",             1.0,            0.0,             "largest norm of the gradient, 0 = any"),
    ("ema",              0.99,           0.9999,          "decay of the moving average of the weights"),
    # generation: pictures during training, and the defaults of sample.py
    ("sampler",          "exchange",     "paper",         "paper (Eq. 9-10) or exchange (Eq. 8 with its exact posterior)"),
    ("sample_steps",     10,             25,              "steps from noise to data"),
    ("guidance",         "4",            "4,50,55",       "guidance weight, or three for the thirds of the steps"),
    ("top_p",            1.0,            0.8,             "draw x_0 from the likeliest counts that exceed this probability"),
    ("top_k",            0,              0,               "draw from the k likeliest counts, 0 = all"),
    # the machine
    ("seed",             0,              0,               "all random draws hang on it"),
    ("device",           "auto",         "auto",          "auto, cpu, cuda"),
    ("bf16",             "auto",         "auto",          "bfloat16 autocast: on, off, auto = where the processor is fast at it"),
    ("tf32",             True,           True,            "float32 products in TF32, on GPUs that have it"),
    ("compile",          False,          True,            "torch.compile"),
    ("fused_adamw",      True,           True,            "PyTorch's fused AdamW"),
    ("fused_attention",  "auto",         "auto",          "flash attention: on, off, auto = on a GPU or for long sequences"),
    ("recompute",        False,          False,           "activation checkpointing: less memory, a third more time"),
    ("workers",          0,              8,               "processes that read images, for each training process"),
    # what is written
    ("out",              "fsdd.pt",      "fsdd.pt",       "the checkpoint; the log and the picture stand beside it"),
    ("tokens",           "tokens.npy",   "tokens.npy",    "the encoded training set"),
    ("log_every",        20,             100,             "steps between lines of the log"),
    ("save_every",       500,            5000,            "steps between checkpoints"),
    ("picture_every",    500,            5000,            "steps between pictures"),
]
COLUMNS = ["step", "loss", "lr"]  # of the log


def main(argv=None):
    cfg, checkpoint = common.parse(HYPERPARAMETERS, __doc__, "fsdd", argv)
    stage1 = checkpoint["tokenizer"] if checkpoint else common.load_checkpoint(
        cfg.tokenizer, "python train_tokenizer.py", "tokenizer")
    device, rank, processes = common.start_processes(cfg.device, cfg.tf32)
    began = time.time()
    common.check_folder(cfg.tokens)
    try:
        tokenizer, train_set, test_set, model_config, generation = prepare(stage1, device, cfg)
        torch.manual_seed(cfg.seed)
        model = Denoiser(**model_config).to(device)
        rows = common.share_of_batch(cfg, len(train_set), rank, processes)  # of every global batch, this process's
        start = common.check_resume(checkpoint, train_set)
        tokens = encode_training_set(tokenizer, train_set, device, rank, processes, cfg)  # (1 or 2, N, M)
    except ValueError as problem:
        common.stop(str(problem))
    M, C = tokenizer.num_tokens, tokenizer.codebook_size
    if rank == 0:
        print(f"sets of {M} tokens out of {C} codes: {set_bits(M, C):.0f} bits an image, "
              f"as sequences they would be {sequence_bits(M, C):.0f}", flush=True)
    header = {"kind": "fsdd", "model_config": model_config, "class_names": train_set.class_names,
              "images": train_set.fingerprint(), "generation": generation,
              "tokenizer": {name: stage1[name] for name in ("model_config", "weights")}}
    common.set_switches(tokenizer, cfg)
    with common.SignalsNoted() as signals:
        averaged = train(model, tokens, train_set.labels, rows, checkpoint, start, header, cfg, signals, forward_backward,
                         lambda averaged: draw_samples(averaged, tokenizer, header, device, cfg))
    if signals.agreed:
        return common.leave(signals, cfg)
    loss = evaluate(averaged, tokenizer, test_set, device, rank, processes, cfg)
    if rank == 0:
        print(f"{cfg.out}: {cfg.steps} steps in {common.duration(time.time() - began)}; "
              f"loss {loss:.4f} on the sets of {len(test_set)} test images")


def prepare(stage1, device, cfg):
    """The tokenizer, the two datasets, the denoiser's arguments and those of fsdd.refine(); ValueError where they don't fit."""
    tokenizer = SetTokenizer(**stage1["model_config"]).to(device).eval()
    tokenizer.load_state_dict(stage1["weights"])
    M, C = tokenizer.num_tokens, tokenizer.codebook_size
    if C > 2 ** 16:
        raise ValueError(f"the token file holds codes up to 65535, the tokenizer has {C} codes")
    train_set, test_set = open_datasets(cfg, tokenizer.image_size)
    if train_set.channels != stage1["model_config"]["channels"]:
        raise ValueError(f"the images of {cfg.data} have {train_set.channels} channels, those of {cfg.tokenizer} "
                         f"{stage1['model_config']['channels']}; give the --data that it was trained on")
    if test_set.class_names != train_set.class_names:
        raise ValueError(f"the classes in {cfg.data}/train and {cfg.data}/val are not the same")
    if cfg.model not in MODELS:
        raise ValueError(f"--model must be one of {', '.join(MODELS)}, got {cfg.model!r}")
    sample_noise(1, C, M, cfg.prior)  # refuses a prior that there is not
    sample_times(torch.zeros(1), cfg.times)  # and a density of times
    model_config = {"codebook_size": C, "num_tokens": M, "num_classes": len(train_set.class_names)}
    width, layers, heads = MODELS[cfg.model]
    model_config |= {"width": cfg.width or width, "layers": cfg.layers or layers, "heads": cfg.heads or heads,
                     "unused_rows": cfg.unused_rows, "gelu": cfg.gelu}
    generation = {"prior": cfg.prior, "sampler": cfg.sampler, "steps": cfg.sample_steps,
                  "guidance": common.three_numbers(cfg.guidance), "top_p": cfg.top_p, "top_k": cfg.top_k}
    check_sampling(generation)
    return tokenizer, train_set, test_set, model_config, generation


def train(model, tokens, labels, rows, checkpoint, start, header, cfg, signals, forward_backward, draw_samples):
    """The training loop, from step start to the last or to a signal. Returns the model with its averaged weights.

    forward_backward: see below; paper/table5_priors.py has others.  draw_samples: the model with averaged weights -> a picture.
    """
    device = next(model.parameters()).device
    common.set_switches(model, cfg)
    ema = common.moving_average(model, cfg.ema)
    optimizers = common.make_optimizers(model, cfg, decay_all=True)
    if checkpoint:
        common.restore(checkpoint, model, ema, optimizers)
    else:
        common.keep_previous(cfg.out)
    parallel = common.wrap(model, device, cfg)
    log = common.open_log(common.beside(cfg.out, ".csv"), COLUMNS, start)
    progress = common.progress_bar(start, cfg.steps)

    for step in range(start, cfg.steps):
        random = common.generator(device, "step", cfg.seed, step)
        indices = batch_indices(len(labels), cfg.batch_size, cfg.seed, step)[rows]
        loss = forward_backward(parallel, tokens, indices, labels, rows, random, header["model_config"], cfg)
        lr = optimizers[0][1].get_last_lr()[0]
        common.optimizer_step(model, ema, optimizers, cfg.clip)

        done = step + 1
        progress.update()
        if common.due(done, cfg.log_every, cfg.steps):
            loss = common.sum_over_processes(loss).item()
            log([done, loss, lr])
            common.show(progress, cfg, f"loss {loss:.4f}")
        if signals.arrived() or common.due(done, cfg.save_every, cfg.steps):
            common.save_training(header, done, cfg, model, ema, optimizers)
        if signals.agreed:
            break
        if common.due(done, cfg.picture_every, cfg.steps):
            draw_samples(ema.module)
    progress.close()
    return ema.module


def forward_backward(model, tokens, indices, labels, rows, random, model_config, cfg):
    """Gradients of the loss over the global batch, of which this process holds the images in indices (rows,).

    All noise is drawn for the whole global batch and cut to this process's rows, so that it is the same for any number of
    processes. Returns this process's part of the mean loss.
    """
    B, device = cfg.batch_size, random.device
    M, C, null = (model_config[name] for name in ("num_tokens", "codebook_size", "num_classes"))
    x0, labels, t = read_batch(tokens, indices, labels, rows, random, null, cfg)
    x0 = tokens_to_counts(x0, C)  # (rows, C)
    x1 = sample_noise(B, C, M, cfg.prior, random, device)[rows]
    uniform = torch.rand(B, C, generator=random, device=device)[rows]
    loss_of = lambda part: fsdd_loss(model, x0[part], labels[part], t[part], x1[part], uniform[part])  # noqa: E731
    return gradients(model, loss_of, rows, device, cfg)


def read_batch(tokens, indices, labels, rows, random, null, cfg):
    """This process's rows of a global batch: tokens (rows, M) int64, labels (rows,), some dropped for null, times t (rows,) in
    (0, 1]. indices (rows,): the images."""
    device = random.device
    mirrored, dropped, t = torch.rand(3, cfg.batch_size, generator=random, device=device)[:, rows]  # each (rows,)
    versions = (mirrored * len(tokens)).long().cpu()  # as it is or, where tokens has a second version, mirrored
    x = torch.from_numpy(tokens[versions.numpy(), indices.numpy()].astype(np.int64)).to(device)  # (rows, M)
    return x, torch.where(dropped < cfg.label_drop, null, labels[indices].to(device)), sample_times(t, cfg.times)


def gradients(model, loss_of, rows, device, cfg):
    """Gradients of the mean over the global batch of loss_of, a slice of this process's rows -> their mean loss. Returns this
    process's part of that mean."""
    total = torch.zeros((), device=device)

    def counted(part):
        with common.autocast(device, cfg.bf16):
            loss = loss_of(part)
        total.add_(loss.detach() * (part.stop - part.start) / cfg.batch_size)
        return loss

    common.backward(model, counted, rows, cfg.device_batch, cfg.batch_size)
    return total


def encode_training_set(tokenizer, dataset, device, rank, processes, cfg):
    """The tokens of every training image, and of its mirror image where cfg.flip: (1 or 2, N, M) uint16, memory-mapped.

    The file at cfg.tokens is used again if it was made with the same tokenizer weights from the same images; what it was
    made from stands beside it in a .json file. All processes encode, the main process writes, and a run that is cut off
    here goes on where it was. ValueError where another process can't see the file.
    """
    made_from = hashlib.sha256(f"{dataset.fingerprint()} {tokenizer.image_size}".encode())
    for name, weight in tokenizer.state_dict().items():
        made_from.update(name.encode() + weight.cpu().numpy().tobytes())
    shape = (2 if cfg.flip else 1, len(dataset), tokenizer.num_tokens)
    note = {"made_from": made_from.hexdigest(), "shape": list(shape)}
    path, note_path = cfg.tokens, common.beside(cfg.tokens, ".json")
    if common.from_all_processes(os.path.isfile(path) and common.read_json(note_path) == note)[0]:
        if rank == 0:
            print(f"{path} holds the tokens of these images by this tokenizer; used again", flush=True)
    else:
        encode(tokenizer, dataset, shape, note, device, rank, processes, cfg)
        if rank == 0:
            if os.path.exists(note_path):
                os.remove(note_path)  # first, so that at no moment these tokens stand beside another's note
            os.replace(path + ".tmp", path)
            common.write_json(note, note_path)
            os.remove(path + ".tmp.json")
        common.wait_for_all()
    common.together(check_shared, path, note_path, note)
    return np.load(path, mmap_mode="r")


def encode(tokenizer, dataset, shape, note, device, rank, processes, cfg):
    """Write the tokens to cfg.tokens.tmp, and beside it how many images are done; goes on from there if the note is the same.

    Each turn every process encodes a part of the images and the main process writes what all have found. The parts are the
    same for any number of processes and wherever a run was cut off, and so are the tokens.
    """
    path, note_path = cfg.tokens + ".tmp", cfg.tokens + ".tmp.json"
    done = 0
    if rank == 0:
        found = common.read_json(note_path)
        done = found.get("done", 0) if os.path.isfile(path) and found | note == found else 0
        if not done:
            common.write_json(note | {"done": 0}, note_path)  # first, lest a kill leave a new file beside an old note
            np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=shape)
        tokens = np.load(path, mmap_mode="r+")
    done = common.from_all_processes(done)[0]
    common.together(check_shared, path, note_path, note | {"done": done})
    parts = common.chunks(slice(done, len(dataset)), min(250, max(1, 2 ** 22 // tokenizer.image_size ** 2)))
    batches = in_order(dataset, parts[rank::processes], cfg.workers)
    for turn in tqdm(range(0, len(parts), processes), desc="encoding the training set", disable=rank > 0, mininterval=5):
        mine = None
        if turn + rank < len(parts):
            images = next(batches)[0].to(device) / 127.5 - 1  # (n, ch, H, W) in [-1, 1]
            with common.autocast(device, cfg.bf16):
                mine = torch.stack([tokenizer.encode(images if version == 0 else images.flip(3)) for version in range(shape[0])])
            mine = mine.cpu().numpy().astype(np.uint16)  # (1 or 2, n, M)
        for part, found in zip(parts[turn:], gather(mine, rank, processes)):
            tokens[:, part] = found
        last = turn + processes >= len(parts)
        if rank == 0 and (last or turn // processes % 20 == 19):
            tokens.flush()
            common.write_json(note | {"done": parts[min(turn + processes, len(parts)) - 1].stop}, note_path)


def check_shared(path, note_path, note):
    """ValueError where this process does not see a file that the main process wrote, with its note."""
    if not os.path.isfile(path) or common.read_json(note_path) != note:
        raise ValueError(f"not every machine sees {path} as the first one wrote it; --tokens must lie in a folder they share")


@torch.no_grad()
def evaluate(model, tokenizer, dataset, device, rank, processes, cfg):
    """The loss on a dataset, one time t and one noise vector an image, the same at every call."""
    C, M = model.codebook_size, model.num_tokens
    total = torch.zeros((), dtype=torch.float64, device=device)
    parts = common.chunks(slice(0, len(dataset)), min(250, max(1, 2 ** 18 // C)))[rank::processes]  # what memory allows
    for part, (images, labels) in zip(parts, in_order(dataset, parts, cfg.workers)):
        random = common.generator(device, "test", cfg.seed, part.start)
        t = 1 - torch.rand(len(images), generator=random, device=device)
        x1 = sample_noise(len(images), C, M, cfg.prior, random, device)
        uniform = torch.rand(x1.shape, generator=random, device=device)
        with common.autocast(device, cfg.bf16):
            x0 = tokens_to_counts(tokenizer.encode(images.to(device) / 127.5 - 1), C)
            total += fsdd_loss(model, x0, labels.to(device), t, x1, uniform) * len(images)
    return common.sum_over_processes(total).item() / len(dataset)


def draw_samples(model, tokenizer, header, device, cfg):
    """A grid of samples, a row for each of up to ten classes."""
    if common.is_main():
        class_names = header["class_names"]
        classes = torch.arange(len(class_names))[:: -(-len(class_names) // 10)]
        random = common.generator(device, "sample", cfg.seed)
        with common.autocast(device, cfg.bf16):
            counts = torch.cat([generate(model, labels, **header["generation"], generator=random)
                                for labels in classes.repeat_interleave(10).to(device).split(cfg.device_batch)])
        images = decode(tokenizer, counts_to_tokens(counts))
        common.grid(images, 10, [class_names[i] for i in classes]).save(common.beside(cfg.out, ".png"))


if __name__ == "__main__":
    common.run(main)
