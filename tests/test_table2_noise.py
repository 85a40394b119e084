"""Table 2: the tokens that noise leaves as they were."""
from collections import Counter

import pytest
import torch

from paper import table2_noise, table6_sweep, variants
from paper.layouts import KINDS
from tests.conftest import few_digits
from tests.test_common import assert_one_sentence, run_here

TINY = {"width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "batch_size": 8, "bf16": "off", "steps": 2}
SMALL = dict(image_size=28, channels=1, patch_size=7, num_tokens=16, codebook_size=20, code_dim=4, width=16, heads=2,
             encoder_layers=2, decoder_layers=1)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Variants of two steps on few digits, in a folder of their own."""
    monkeypatch.setattr(table2_noise, "TOKENIZER", TINY)
    monkeypatch.setattr(variants, "FOLDER", f"{tmp_path}/cache")
    for place in ("data.reading.open_dataset", "evaluate_fid.open_dataset"):
        monkeypatch.setattr(place, lambda where, split, size, **_: few_digits(split, 60))
    return tmp_path


def save_tokenizer(path, data="digits", kind="tokenizer", **settings):
    """A checkpoint of a tokenizer of 28 x 28 images with large random matrices, as a fresh one's latents do not see the
    image."""
    torch.manual_seed(1)
    model_config = SMALL | settings
    model = KINDS[kind](**model_config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    checkpoint = {"kind": kind, "model_config": model_config, "weights": model.state_dict()}
    torch.save(checkpoint | ({"config": {"data": data}} if data else {}), path)
    return model


def table(said):
    """The cells of a Markdown table, without its head."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize("tokens, others, as_set, as_sequence", [
    ([1, 2, 3, 4], [1, 2, 3, 4], 1, 1), ([1, 2, 3, 4], [4, 3, 2, 1], 1, 0), ([1, 2, 3, 4], [1, 3, 5, 5], 0.5, 0.25),
    ([1, 1, 1, 2], [1, 2, 2, 2], 0.5, 0.5), ([0, 0, 0, 0], [5, 5, 5, 5], 0, 0), ([1, 1, 2, 2], [2, 2, 1, 0], 0.75, 0)])
def test_overlap_by_hand(tokens, others, as_set, as_sequence):
    """Broken: repeated tokens would count once, or more often than both have them; or the order would matter to a
    set."""
    found = table2_noise.overlap(torch.tensor([tokens]), torch.tensor([others]), 6)
    assert [share.tolist() for share in found] == [[as_set], [as_sequence]]


@pytest.mark.parametrize("C", [1, 3, 40])
def test_overlap_is_that_of_counters(C):
    """Broken: the shares would differ from a count by hand, or mix up the images of a batch."""
    tokens, others = torch.randint(C, (2, 50, 9))
    others[::2, :5] = tokens[::2, :5]
    as_set, as_sequence = table2_noise.overlap(tokens, others, C)
    for a, b, in_set, in_sequence in zip(tokens.tolist(), others.tolist(), as_set.tolist(), as_sequence.tolist()):
        assert in_set == pytest.approx((Counter(a) & Counter(b)).total() / 9)
        assert in_sequence == pytest.approx(sum(x == y for x, y in zip(a, b)) / 9) and in_sequence <= in_set + 1e-6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("snr", table2_noise.SNRS)
def test_noise_has_the_power_asked_for(snr, channels):
    """Broken: the ratio would be that of other units, of amplitudes, or of the batch instead of each image."""
    brightness = torch.tensor([1, 0.5, 0.1, 0.01, 1, 0]).view(6, 1, 1, 1)
    pixels = torch.rand(6, channels, 64, 64, dtype=torch.float64) * brightness
    noisy = table2_noise.add_noise(2 * pixels - 1, torch.randn(pixels.shape, dtype=torch.float64), snr)
    noise = (noisy + 1) / 2 - pixels
    ratio = 10 * torch.log10(pixels.square().mean((1, 2, 3)) / noise.square().mean((1, 2, 3)))
    assert (ratio[:5] - snr).abs().max() < 0.3
    assert noise[5].abs().max() < 1e-12  # black has no signal, so no noise either
    if snr == 1:
        assert noisy.min() < -1 and noisy.max() > 1  # not clipped


@pytest.mark.parametrize("share", [(0, 1), (0, 3), (1, 3), (2, 3)])
def test_images_lie_evenly_in_the_data(share, monkeypatch):
    """Broken: of validation images in the order of their classes only the first classes would be seen, or an image
    twice."""
    dataset = few_digits("test", 700)
    found = list(table2_noise.batches(dataset, 300, 28, torch.device("cpu"), *share, 0))
    indices = [i for some, _ in found for i in some]
    rank, processes = share
    assert indices == [i * 700 // 300 for i in range(300 * rank // processes, 300 * (rank + 1) // processes)]
    assert torch.allclose(torch.cat([images for _, images in found]), dataset.images[indices] / 127.5 - 1)


def test_the_table(tmp_path, capsys, monkeypatch):
    """Broken: a row would not be that tokenizer's, the two ways to count would be exchanged, or noise would change from
    run to run or with the number of images at once."""
    monkeypatch.setattr("evaluate_fid.open_dataset", lambda where, split, size: few_digits(split, 90))
    model = save_tokenizer(tmp_path / "set.pt")
    save_tokenizer(tmp_path / "sequence.pt", kind="sequence tokenizer", num_tokens=7)
    save_tokenizer(tmp_path / "grid.pt", kind="grid tokenizer")
    arguments = ["--ckpt", *(f"{tmp_path}/{name}.pt" for name in ("grid", "sequence", "set")), "--device=cpu"]
    table2_noise.main(arguments)
    rows = table(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [["grid", "16"], ["sequence", "7"], ["set, as a sequence", "16"], ["set", "16"]]
    shares = [[float(share) for share in row[2:-1]] for row in rows]
    for row in shares:
        assert len(row) == 5 and 100 >= row[0] > row[2] > row[4] >= 0
    assert all(a <= b for a, b in zip(*shares[2:])) and shares[2] != shares[3]
    images = few_digits("test", 90).images / 127.5 - 1
    assert float(rows[3][-1]) == pytest.approx((model.decode(model.encode(images)) - images).square().mean().item(),
                                               abs=1e-4)
    batches = table2_noise.batches

    def one_by_one(*arguments):
        for indices, images in batches(*arguments):
            yield from (([i], image[None]) for i, image in zip(indices, images))

    monkeypatch.setattr(table2_noise, "batches", one_by_one)
    table2_noise.main(arguments)
    assert table(capsys.readouterr().out) == rows


def test_without_noise_all_stays(tmp_path, monkeypatch):
    """Broken: the shares would be less than all where nothing is different, or more than all."""
    monkeypatch.setattr("evaluate_fid.open_dataset", lambda where, split, size: few_digits(split, 90))
    monkeypatch.setattr(table2_noise, "add_noise", lambda images, noise, snr: images)
    save_tokenizer(tmp_path / "set.pt")
    args = table2_noise.parse([f"--ckpt={tmp_path}/set.pt"])
    tokenizer, dataset = table2_noise.load(args.ckpt[0], None, torch.device("cpu"))
    as_set, as_sequence, _ = table2_noise.measure(tokenizer, dataset, 70, args, torch.device("cpu"), 0, 1)
    assert as_set == as_sequence == [1] * 5


def test_the_digits_are_trained(quick, capsys):
    """Broken: without checkpoints the three layouts would not be trained, or trained again by the second run."""
    table2_noise.main(["--device=cpu"])
    said = capsys.readouterr().out
    assert [row[:2] for row in table(said)] == [["grid", "16"], ["sequence", "16"], ["set, as a sequence", "16"],
                                                ["set", "16"]]
    assert said.count("mean squared error") == 4  # three trainings and the head of the table
    table2_noise.main(["--device=cpu"])
    again = capsys.readouterr().out
    assert again.count("mean squared error") == 1 and table(again) == table(said)


def test_the_set_is_that_of_table_6(tmp_path, monkeypatch):
    """Broken: the tables would train the same model twice."""
    trained = []
    monkeypatch.setattr(variants, "FOLDER", str(tmp_path))
    monkeypatch.setattr(variants.train_tokenizer, "main", lambda argv, *_: trained.append(argv))
    monkeypatch.setattr(variants, "fid", lambda *_, **__: 0.0)
    monkeypatch.setattr(variants, "fsdd", lambda *_, **__: "")
    path = table2_noise.trained("set", "cpu")
    monkeypatch.setattr(table6_sweep.variants, "tokenizer", lambda **options: paths.append(variants.trained(
        variants.train_tokenizer, "tokenizer", options, options)))
    paths = []
    args = table6_sweep.parse(["--device=auto"])
    assert (16, 128) in table6_sweep.pairs(args.num_tokens, args.codebook_sizes)
    table6_sweep.train(16, 128, args, torch.device("cpu"))
    assert paths == [path] and len(trained) == 2 and f"--out={path}" in trained[0]


def test_mistakes_get_one_sentence(tmp_path):
    """Broken: a mistake would end in a traceback."""
    main = table2_noise.main
    assert_one_sentence(run_here(main, "--ckpt=none.pt", folder=tmp_path), "no checkpoint none.pt",
                        "train_tokenizer.py")
    assert_one_sentence(run_here(main, "--num=0", folder=tmp_path), "--num", "at least 1")
    assert_one_sentence(run_here(main, "--workers=-1", folder=tmp_path), "--workers", "at least 0")
    save_tokenizer(tmp_path / "imported.pt", data=None)
    assert_one_sentence(run_here(main, "--ckpt=imported.pt", folder=tmp_path), "imported.pt", "--data")
    assert_one_sentence(run_here(main, "--ckpt=imported.pt", "--data=nowhere", folder=tmp_path), "nowhere/val")
    save_tokenizer(tmp_path / "colour.pt", channels=3)
    assert_one_sentence(run_here(main, "--ckpt=colour.pt", folder=tmp_path), "1 channels", "3", "--data")
