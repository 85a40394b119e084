"""FID, Inception Score, precision and recall against their definitions and torch-fidelity's numbers."""
import json
import re
from unittest import mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate_fid
import sample
from data import open_dataset
from evaluate_fid import frechet_distance
from published import classifier, inception
from published.classifier import classifier_of
from support.files import load_checkpoint, save_checkpoint
from support.pictures import to_uint8
from tests.conftest import few_digits, pictures
from tests.scripts import assert_one_sentence, run_here, run_ranks, successful

# --- the distance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D, N", [(3, 10), (40, 100), (100, 30)])
def test_distance_is_the_usual_formula(D, N):
    """Fails if the distance is not the Frechet distance, also for singular covariances (N < D)."""
    x, y = torch.randn(2, N, D, dtype=torch.float64)
    y = y @ torch.randn(D, D, dtype=torch.float64) + 1
    (mu1, sigma1), (mu2, sigma2) = ((z.mean(0).numpy(), np.cov(z.numpy(), rowvar=False)) for z in (x, y))
    root = np.sqrt(np.linalg.eigvals(sigma1 @ sigma2).astype(complex)).real.sum()
    usual = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(usual, rel=1e-6)
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(usual, rel=1e-6)
    assert 0 <= frechet_distance(mu1, sigma1, mu1, sigma1) < 1e-6 * np.trace(sigma1)
    with pytest.raises(ValueError, match="same length"):
        frechet_distance(mu1, sigma1, mu2[1:], sigma2[1:, 1:])
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(mu1, sigma1, mu2 * np.nan, sigma2)


# --- the digits ------------------------------------------------------------------------------------------------------


def evaluate(*arguments, folder):
    """The JSON of evaluate_fid.py with these arguments."""
    evaluate_fid.main([*map(str, arguments), f"--json={folder}/r.json", "--device=cpu"])
    return json.loads((folder / "r.json").read_text())


@torch.no_grad()
def classify(digits, images):
    """Features (N, 128) and classes (N,) by the classifier of the fixture digits."""
    net = classifier_of(few_digits("test", 1), "digits")
    net.load_state_dict(load_checkpoint(digits / "digits_classifier.pt", "", "digits classifier")["weights"])
    features, logits = net(images)
    return features, logits.argmax(1)


def distance(*features):
    """The Frechet distance between two sets of features (N, D)."""
    statistics = [array for x in features for array in (x.double().mean(0), np.cov(x.double().T))]
    return pytest.approx(frechet_distance(*statistics), rel=1e-5)


def test_generated_digits(digits, small_digits, tmp_path, capsys):
    """Fails if the measured images are not those of sample.py, if they are compared with other images than the training
    digits, or if the result is called an FID."""
    options = ["--ckpt", str(digits / "fsdd.pt"), "--num=120", "--seed=3", "--steps=2"]
    found = evaluate(*options, folder=tmp_path)
    assert "digits_fid: " in capsys.readouterr().out
    assert not {"fid", "precision", "recall", "inception_score"} & found.keys()
    sample.main([*options, f"--out={tmp_path}/s.npz", "--device=cpu"])
    with np.load(tmp_path / "s.npz") as file:
        images, labels = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2), torch.from_numpy(file["arr_1"])
    ours, classes = classify(digits, images)
    theirs, _ = classify(digits, few_digits("train", 600).images)
    assert found["digits_fid"] == distance(ours, theirs) and found["reference"] == "the training digits"
    assert found["classified_as_label"] == pytest.approx((classes == labels).double().mean().item())


def test_classes_of_generated_emoji(digits):
    """Fails if emoji, whose classes differ in size, are generated with other shares of classes than they have in the
    training set that they are compared with."""
    checkpoint, args = load_checkpoint(digits / "fsdd.pt", "", "fsdd"), evaluate_fid.parse(["--ckpt=fsdd.pt"])
    emoji = open_dataset("emoji", "train", 32)
    of_emoji = checkpoint | {"class_names": emoji.class_names}
    images = evaluate_fid.generated("fsdd.pt", of_emoji, args, "emoji", torch.device("cpu"))
    shares = emoji.labels.bincount() / 4006
    assert evaluate_fid.generated("", checkpoint, args, "emoji", torch.device("cpu")).labels.max() == 9  # other classes
    assert images.num == 2000 and (images.labels.bincount() / 2000 - shares).abs().max() < 1 / 2000


def test_reconstructed_digits(digits, small_digits, tmp_path):
    """Fails if rFID does not compare the validation images with their own reconstructions, or if --num takes the first
    ones, which on ImageNet are of few classes."""
    found = evaluate("--ckpt", digits / "tokenizer.pt", "--num=37", folder=tmp_path)
    checkpoint = torch.load(digits / "tokenizer.pt", weights_only=True)
    model = sample.load_tokenizer(checkpoint, "cpu")
    chosen = [i * 400 // 37 for i in range(37)]
    test = few_digits("test", 400)
    images, labels = test.images[chosen], test.labels[chosen]
    ours, classes = classify(digits, to_uint8(model.decode(model.encode(images / 127.5 - 1))))
    assert found["digits_fid"] == distance(ours, classify(digits, images)[0]) and found["num_images"] == 37
    assert found["reference"] == "the validation images of digits"
    assert found["classified_as_label"] == pytest.approx((classes == labels).double().mean().item())


@pytest.mark.parametrize("arguments", [["--ckpt=fsdd.pt", "--ref=generated.npz"], ["--ckpt=tokenizer.pt"]])
def test_same_numbers_for_any_number_of_ranks(arguments, digits):
    """Fails if under torchrun only a part of the images, or other images, are measured."""
    results = []
    for world_size in (1, 3):
        options = [*arguments, "--num_images=130", "--batch=50", "--bf16=off", "--device=cpu", "--json=r.json",
                   "--save_stats=s.npz"]
        successful(run_ranks("evaluate_fid.py", *options, folder=digits, world_size=world_size))
        with open(digits / "r.json") as file, np.load(digits / "s.npz") as statistics:
            results.append((json.load(file), statistics["mu"], statistics["sigma"]))
    (alone, mu, sigma), (together, other_mu, other_sigma) = results
    assert alone["num_images"] == 130 and alone["digits_fid"] > 0.1 and sigma.max() > 0.01  # the images differ
    np.testing.assert_allclose(other_mu, mu, rtol=1e-12)
    np.testing.assert_allclose(other_sigma, sigma, rtol=0, atol=1e-12 * (sigma.diagonal() + mu ** 2).max())
    for name, value in alone.items():  # 1e-7: with singular covariances a distance holds the roots of rounding
        assert together.pop(name) == (pytest.approx(value, rel=1e-7) if isinstance(value, float) else value), name
    assert not together


def test_statistics_are_saved_and_used_again(digits, small_digits, tmp_path, monkeypatch, capsys):
    """Fails if saved statistics are not those of the images, or if they are compared with those of other features."""
    monkeypatch.chdir(digits)
    evaluate("--data=digits", "--images=test.npz", f"--save_stats={tmp_path}/test.npz", folder=tmp_path)
    generated = ["--ckpt=fsdd.pt", "--num=100", f"--save_stats={tmp_path}/generated.npz", "--ref"]
    by_images = evaluate(*generated, "test.npz", folder=tmp_path)
    with np.load(tmp_path / "test.npz") as file:
        arrays = dict(file)
    assert arrays["num"] == 300 and arrays["size"] == "28 x 28" and arrays["mu"].shape == (128,)
    images = np.load("test.npz")["arr_0"][:50]
    np.savez(tmp_path / "adm.npz", **arrays | {"size": "14 x 14"}, arr_0=images)  # statistics and images, as ADM's
    for name in ("test", "adm"):
        found = evaluate(*generated, f"{tmp_path}/{name}.npz", folder=tmp_path)
        assert found["digits_fid"] == pytest.approx(by_images["digits_fid"], rel=1e-9)
        assert ("digits_precision" in found) == (name == "adm")
    warned = capsys.readouterr().err
    assert "warning: 100 images for 128 features" in warned and "warning: 50 images" not in warned
    assert "the images have 28 x 28 pixels, those of the reference 14 x 14" in warned
    monkeypatch.setattr(evaluate_fid, "network", mock.Mock(side_effect=AssertionError("no network is needed")))
    alone = evaluate("--images", tmp_path / "generated.npz", "--ref", tmp_path / "test.npz", folder=tmp_path)
    assert alone.keys() == {"images", "features", "reference", "digits_fid"}
    assert alone["digits_fid"] == pytest.approx(by_images["digits_fid"], rel=1e-7)
    np.savez(tmp_path / "other.npz", **arrays | {"features": "digits classifier 0"})
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    for name in ("other.npz", "wide.npz"):
        with pytest.raises(SystemExit, match=f"{name} holds statistics of .* can't be compared"):
            evaluate("--images", tmp_path / "generated.npz", f"--ref={tmp_path}/{name}", folder=tmp_path)


def test_numbers_come_before_files(digits, small_digits, tmp_path, capsys):
    """Fails if a full disk loses the results of an evaluation of hours."""
    with pytest.raises(OSError, match="File name too long"):  # one sentence, by run()
        evaluate("--data=digits", f"--images={digits}/test.npz", f"--classifier={digits}/digits_classifier.pt",
                 f"--save_stats={'a' * 300}.npz", folder=tmp_path)
    assert "digits_fid: " in capsys.readouterr().out and (tmp_path / "r.json").exists()


def test_a_checkpoint_as_the_reference(digits, small_digits, tmp_path, monkeypatch):
    """Fails if two checkpoints can't be compared, or if precision and recall are exchanged."""
    monkeypatch.chdir(digits)
    one = evaluate("--ckpt=fsdd.pt", "--ref=tokenizer.pt", "--num=100", folder=tmp_path)
    other = evaluate("--ckpt=tokenizer.pt", "--ref=fsdd.pt", "--num=100", folder=tmp_path)
    assert one["digits_fid"] == pytest.approx(other["digits_fid"], rel=1e-7) and one["digits_fid"] > 1
    assert one["digits_precision"] == other["digits_recall"] != one["digits_recall"] == other["digits_precision"]


def test_the_classifier_is_kept(small_digits, tmp_path, monkeypatch, capsys):
    """Fails if it is trained in every run, or its weights depend on chance."""
    monkeypatch.setattr(classifier, "STEPS", 3)
    np.savez("few.npz", arr_0=np.zeros((2, 28, 28, 1), np.uint8))
    names = []  # with a hash of the weights
    for trained in (True, False, True):
        torch.manual_seed(len(names))
        names.append(evaluate("--images=few.npz", "--ref=few.npz", "--data=digits", folder=tmp_path)["features"])
        assert ("training the classifier" in capsys.readouterr().out) == trained
        if not trained:
            (tmp_path / "digits_classifier.pt").unlink()
    assert names[0] == names[1] == names[2] and names[0].startswith("digits classifier ")


def test_a_classifier_replaces_no_other_file(digits, tmp_path):
    """Fails if --classifier with a name of something else, such as the tokenizer, replaces it by a new classifier."""
    for content in (b"no checkpoint", (digits / "tokenizer.pt").read_bytes()):
        (tmp_path / "other.pt").write_bytes(content)
        with pytest.raises(SystemExit, match="^error: other.pt [^\n]*--classifier names another one$"):
            classifier.open_classifier("digits", "other.pt", torch.device("cpu"), 0)
        assert (tmp_path / "other.pt").read_bytes() == content


# --- Inception -------------------------------------------------------------------------------------------------------

# What torch-fidelity 0.4.0 computes from the same weights and images, in three equal channels (calculate_metrics with
# fid, isc, prc, and the feature extractor inception-v3-compat).
FIDELITY = {"fid": 523.91057, "inception_score": 1.07096069, "inception_score_std": 0.14334698, "precision": 10 / 12,
            "recall": 14 / 15}


@pytest.mark.slow
def test_numbers_are_torch_fidelitys(weight_file, tmp_path):
    """Fails if FID, Inception Score, precision or recall are not those that others publish, if they depend on the
    batches, or if digits are measured by the classifier in spite of --inception."""
    for name, images in (("ours", pictures(12, 64, 1)), ("theirs", pictures(15, 64, 1, seed=1) // 2)):
        np.savez(f"{name}.npz", arr_0=images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    found = evaluate("--images=ours.npz", "--ref=theirs.npz", "--data=digits", "--inception", weight_file, "--batch=5",
                     folder=tmp_path)
    assert {name: found[name] for name in FIDELITY} == pytest.approx(FIDELITY, rel=1e-5)


@pytest.mark.parametrize("arguments, words", [
    ([], "one of the arguments --ckpt --images is required"), (["--images=a", "--num=3"], "--num needs a checkpoint"),
    (["--images=a", "--save_stats=a.txt"], "--save_stats must end in .npz"), (["--images=none"], "there is no none"),
    (["--images=stats.npz", "--save_stats=a.npz"], "stats.npz holds statistics already"),
    (["--images=good.npz", "--ref=one.npz"], "at least two images, got 1 .one.npz"),
    (["--images=good.npz"], "nothing to compare good.npz with; .*VIRTUAL_imagenet256_labeled.npz"),
    (["--images=good.npz", "--ref=good.npz"], f"{inception.ADDRESSES[0]} .*no network.*--inception names the file"),
    (["--ckpt=none.pt"], "no checkpoint none.pt"), (["--ckpt=nodata.pt", "--data=no"], "no folder no/val"),
    (["--ckpt=nodata.pt"], "nodata.pt does not say what it was trained on"),
])
def test_mistakes_get_one_sentence(arguments, words, digits, tmp_path, monkeypatch):
    """Fails if invalid input gives a number or a traceback."""
    images = np.zeros((9, 20, 20, 3), np.uint8)
    np.savez(tmp_path / "good.npz", arr_0=images)
    np.savez(tmp_path / "one.npz", arr_0=images[:1])
    np.savez(tmp_path / "stats.npz", mu=np.zeros(128), sigma=np.eye(128))
    save_checkpoint(torch.load(digits / "tokenizer.pt", weights_only=True) | {"config": {}}, tmp_path / "nodata.pt")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", mock.Mock(side_effect=URLError("no network")))
    finished = run_here(evaluate_fid.main, *arguments, "--device=cpu", folder=tmp_path)
    assert_one_sentence(finished, "error: ")
    assert re.search(words, finished.stderr), finished.stderr


def test_a_mistake_ends_all_ranks(digits, tmp_path):
    """Fails if, after an error on one rank, the others wait or print tracebacks."""
    (tmp_path / "images").mkdir()
    for i, image in enumerate(few_digits("test", 8).images):
        Image.fromarray(image[0].numpy()).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "5.png").write_text("no image")  # of rank 1
    finished = run_ranks("evaluate_fid.py", "--images=images", "--data=digits", "--batch=4", "--device=cpu", "--ref",
                         digits / "test.npz", "--classifier", digits / "digits_classifier.pt", folder=tmp_path,
                         world_size=2)
    assert_one_sentence(finished, "error: images/5.png can't be read", "error: another process of this run has died")
