"""The embedded digits and folders of images."""
import hashlib
import io
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import open_dataset, records
from data.image_folder import center_crop, random_crop
from data.reading import open_datasets
from tests.image_folder import make_image_folder
from tests.test_common import ROOT


def test_digits_are_mnist():
    """Broken: the embedded files would be incomplete or read wrongly, or the two splits mixed up."""
    for split, number, first, per_class in (("train", 60000, 5, 5923), ("test", 10000, 7, 980)):
        digits = open_dataset("digits", split, 28)
        assert len(digits) == number and digits.images.shape == (number, 1, 28, 28)
        assert digits.images.dtype == torch.uint8
        assert digits.labels[0] == first and (digits.labels == 0).sum() == per_class
        # ink is in the middle
        assert digits.images[:, :, 0].float().mean() < 1 and digits.images[:, :, 14].float().mean() > 50
        images, labels = digits.__getitems__([(3, 0), (0, 9)])
        assert torch.equal(images, digits.images[[3, 0]]) and torch.equal(labels, digits.labels[[3, 0]])


def test_no_test_digit_is_trained_on():
    """Broken: numbers on the test digits would be numbers on training digits."""
    train, test = ({hashlib.md5(image.tobytes()).digest() for image in open_dataset("digits", split, 28).images.numpy()}
                   for split in ("train", "test"))
    assert len(train) > 59990 and not train & test


@pytest.fixture
def folder(tmp_path):
    """Two classes, one image nested deeper, of various kinds; red ones are of the first class, blue ones of the
    second."""
    for name, mode, size, colour in (("train/n01/a.JPEG", "RGB", (80, 50), (255, 0, 0)),
                                     ("train/n01/deep/b.png", "RGBA", (40, 90), (255, 0, 0, 9)),
                                     ("train/n02/c.jpg", "RGB", (33, 32), (0, 0, 255)),
                                     ("train/n02/d.png", "L", (200, 131), 0),
                                     ("val/n01/e.jpg", "CMYK", (64, 64), (0, 255, 255, 0)),
                                     ("val/n02/f.png", "P", (32, 32), 0)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, colour).save(path)
    (tmp_path / "train" / "n02" / "notes.txt").write_text("no image")
    return str(tmp_path)


def test_folder_of_classes(folder):
    """Broken: labels would not be indices into the sorted class names, or images not be RGB of the size asked for."""
    train = open_dataset(folder, "train", 32, "random", True, seed=1)
    assert train.class_names == ["n01", "n02"] and train.labels.tolist() == [0, 0, 1, 1] and len(train) == 4
    images, labels = train.__getitems__([(2, 0), (0, 0), (1, 0)])
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8 and labels.tolist() == [1, 0, 0]
    means = images.float().mean((2, 3))
    assert means[0, 2] > 200 and means[1, 0] > 200 and means[2, 0] > 200
    test = open_dataset(folder, "test", 32)
    assert len(test) == 2 and test.__getitems__([(0, 0)])[0].float().mean((0, 2, 3))[0] > 100


def test_crops_hang_on_seed_epoch_and_index(tmp_path):
    """Broken: a resumed run would see other crops, or every epoch the same ones."""
    (tmp_path / "train" / "n01").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(256, size=(70, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "train" / "n01" / "a.png")
    def read(seed, epoch):
        return open_dataset(str(tmp_path), "train", 32, "random", True, seed).__getitems__([(0, epoch)])[0]
    assert torch.equal(read(0, 0), read(0, 0))
    assert len({read(seed, epoch).numpy().tobytes() for seed in range(4) for epoch in range(4)}) > 5
    center = open_dataset(str(tmp_path), "train", 32).__getitems__([(0, 0)])[0]
    assert torch.equal(center, open_dataset(str(tmp_path), "train", 32).__getitems__([(0, 5)])[0])


@pytest.mark.parametrize("make", [lambda path: None, lambda path: (path / "train" / "n01").mkdir(parents=True)])
def test_empty_folders_are_refused(make, tmp_path):
    """Broken: a wrong --data would train on nothing."""
    make(tmp_path)
    with pytest.raises(ValueError, match="train.*CLASS/NAME.JPEG"):
        open_dataset(str(tmp_path), "train", 32)


# --- odd files -------------------------------------------------------------------------------------------------------


def stripes(mode="RGB", size=(48, 32)):
    """Left half red, right half green."""
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 255, 0), (size[0] // 2, 0, *size))
    return image.convert(mode)


def with_alpha():
    image = stripes("RGBA")
    image.putalpha(9)
    return image


def sixteen_bits():
    return Image.fromarray(np.repeat([[40 * 256 + 255] * 24 + [200 * 256] * 24], 32, axis=0).astype(np.uint16))


RED_GREEN = ((255, 0, 0), (0, 255, 0))
FIRST_OF_TWO = dict(save_all=True, append_images=[Image.new("RGB", (48, 32), (0, 0, 255))])
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # "turn by 90 degrees"
ODD = [
    ("a.JPEG", stripes(), {}, RED_GREEN), ("a.Jpg", stripes(), {"progressive": True}, RED_GREEN),
    ("a.WEBP", stripes(), {}, RED_GREEN),
    ("a.BMP", stripes(), {}, RED_GREEN), ("a.jpg", stripes("L"), {}, ((76,) * 3, (150,) * 3)),
    ("a.png", stripes("1"), {}, None),
    ("a.jpeg", stripes("CMYK"), {}, RED_GREEN), ("a.png", stripes("P"), {}, RED_GREEN),
    ("a.png", stripes("P"), {"transparency": 0}, RED_GREEN),
    ("a.png", stripes("P"), {"transparency": bytes([0, 9] * 128)}, RED_GREEN),
    ("a.PNG", with_alpha(), {}, RED_GREEN), ("a.png", stripes("LA"), {}, ((76,) * 3, (150,) * 3)),
    ("a.png", sixteen_bits(), {}, ((40,) * 3, (200,) * 3)), ("a.png", stripes(), FIRST_OF_TWO, RED_GREEN),
    ("a.webp", stripes(), FIRST_OF_TWO, RED_GREEN), ("a.jpg", stripes(), {"exif": ROTATED}, RED_GREEN),
    ("a.jpg", stripes(), {"format": "PNG"}, RED_GREEN),  # ImageNet has such a file
]


@pytest.mark.filterwarnings("ignore:Palette images")  # pytest shows what data.image_folder has silenced
@pytest.mark.parametrize("name, image, options, colours", ODD, ids=range(len(ODD)))
def test_files_of_every_kind(name, image, options, colours, tmp_path):
    """Broken: a file of this kind would have other colours, be turned, or end the training."""
    place = tmp_path / "train" / "n01" / "deep" / "deeper"
    place.mkdir(parents=True)
    image.save(place / name, options.get("format") or {"jpg": "jpeg"}.get(name.lower()[2:], name.lower()[2:]),
               **{key: value for key, value in options.items() if key != "format"})
    for crop in ("center", "random"):
        dataset = open_dataset(str(tmp_path), "train", 32, crop)
        assert dataset.unreadable([0]) == {}
        pixels = dataset.__getitems__([(0, 0)])[0][0].float()  # (3, 32, 32)
        if colours:
            for x, colour in ((1, colours[0]), (30, colours[1])):
                far = (pixels[:, 5:27, x].mean(1) - torch.tensor(colour)).abs().max()
                assert far < 12 or crop == "random", (x, pixels[:, 16, x])
            assert crop == "center" or min((pixels[:, 16, 16 + d] - torch.tensor(c)).abs().max()
                                           for d in (-12, 12) for c in colours) < 12


def test_what_is_no_image_is_passed_over(tmp_path):
    """Broken: hidden files of macOS or others, texts and other formats would be taken for images, or a link be lost
    silently."""
    place = tmp_path / "train" / "n01"
    place.mkdir(parents=True)
    for hidden in (".hidden", "n01/.thumbnails"):
        (tmp_path / "train" / hidden).mkdir()
        stripes().save(tmp_path / "train" / hidden / "a.png")
    stripes().save(place / "a.png")
    stripes().save(place / "b.tif")
    for name in ("._a.png", "a.png.txt", "png"):
        (place / name).write_bytes(b"no image")
    (place / "away.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "linked").mkdir()
    stripes().save(tmp_path / "linked" / "c.jpg")
    (place / "link").symlink_to(tmp_path / "linked")
    dataset = open_dataset(str(tmp_path), "train", 32)
    assert dataset.class_names == ["n01"] and len(dataset.names) == 3
    assert dataset.names.tolist() == [b"n01/a.png", b"n01/away.jpg", b"n01/link/c.jpg"]
    assert list(dataset.unreadable(range(3))) == ["n01/away.jpg"]


def test_fingerprint(tmp_path):
    """Broken: checkpoints from before contents were looked at would not resume, or machines with copies not agree."""
    make_image_folder(tmp_path / "a", 40)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    of = lambda dataset: dataset.fingerprint(contents=False)  # noqa: E731
    first, second = (open_dataset(str(tmp_path / name), "train", 32) for name in "ab")
    assert of(first) == of(second) != of(open_dataset(str(tmp_path / "a"), "test", 32))
    first.drop(["d0/cut.jpg"])
    assert len(first) == len(first.labels) == 40 and of(first) != of(second)
    os.remove(tmp_path / "b" / "train" / "d0" / "cut.jpg")
    assert of(first) == of(open_dataset(str(tmp_path / "b"), "train", 32))
    with open(second.path(5), "ab") as file:
        file.write(b"0")
    assert of(first) != of(open_dataset(str(tmp_path / "b"), "train", 32))


def test_the_same_images_are_known_by_their_contents(tmp_path):
    """Broken: tokens, the note of unreadable files or a checkpoint would be taken for other images of the same names,
    sizes and times; or not be used for copies of the same images."""
    make_image_folder(tmp_path / "a", 40)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)  # with times of its own
    cfg = SimpleNamespace(out=str(tmp_path / "a.pt"), workers=0)

    def fingerprints(name):
        cfg.data = str(tmp_path / name)
        unread = open_dataset(cfg.data, "train", 32).fingerprint()
        return unread, open_datasets(cfg, 32)[0].fingerprint()

    for name in "ab":  # more than 1 % of 41 files
        os.remove(tmp_path / name / "train" / "d0" / "cut.jpg")
    first, copy = fingerprints("a"), fingerprints("b")
    assert first[0] != copy[0] and first[1] == copy[1] == fingerprints("a")[1]
    path = tmp_path / "b" / "train" / "d1" / "00001.JPEG"
    stat, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other = fingerprints("b")
    checkpoint = {"step": 1, "class_names": [f"d{i}" for i in range(10)]}
    dataset, cfg.batch_size = open_datasets(cfg, 32)[0], 4
    for images in (other[1], dataset.fingerprint(contents=False)):  # the latter in a checkpoint from before contents
        records.check_training(cfg, checkpoint | {"images": images}, dataset)
    for wrong in ({"images": copy[1]}, {"images": other[1], "class_names": ["a"]}):
        with pytest.raises(ValueError, match="images or classes are not those of the checkpoint"):
            records.check_training(cfg, checkpoint | wrong, dataset)
    assert path.stat().st_size == stat.st_size and other[0] != copy[0] and other[1] != copy[1]


# --- unreadable files ------------------------------------------------------------------------------------------------


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(size, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("kind, mode, options", [
    ("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}),
    ("JPEG", "RGB", {"restart_marker_blocks": 3}), ("PNG", "RGB", {}), ("WEBP", "RGB", {}), ("BMP", "RGB", {})])
def test_truncated_files_are_found(kind, mode, options, tmp_path):
    """Broken: the check, which decodes JPEGs at an eighth of their size, would pass a file that training can't read."""
    whole = encoded(noise((120, 90), mode), kind, **options)
    place = tmp_path / "train" / "n01"
    place.mkdir(parents=True)
    cuts = sorted({*np.linspace(0, len(whole), 60).astype(int).tolist(), *range(len(whole) - 12, len(whole) + 1)})
    for cut in cuts:
        (place / f"{cut:06}.jpg").write_bytes(whole[:cut])
    dataset = open_dataset(str(tmp_path), "train", 32)
    found = dataset.unreadable(range(len(dataset)))
    can = set()
    for i, cut in enumerate(cuts):
        try:
            dataset.read(i, 0)
            can.add(f"n01/{cut:06}.jpg")
        except ValueError as problem:
            assert f"{cut:06}.jpg can't be read (" in str(problem)
    assert can == {f"n01/{cut:06}.jpg" for cut in cuts} - set(found)
    # no more than the end mark is missing
    assert f"n01/{len(whole):06}.jpg" in can and int(min(can)[4:10]) >= len(whole) - 20
    for name in can:
        assert np.array_equal(dataset.read(cuts.index(int(name[4:10])), 0), dataset.read(len(cuts) - 1, 0))


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n" + b"\0" * 99,
                                     b"BM" + b"\xff" * 99, b"RIFF\x20\0\0\0WEBPVP8 " + b"\1" * 60])
def test_broken_files_are_found(content, tmp_path):
    """Broken: a file that is no image would end the check with a traceback."""
    (tmp_path / "train" / "n01").mkdir(parents=True)
    (tmp_path / "train" / "n01" / "a.jpg").write_bytes(content)
    dataset = open_dataset(str(tmp_path), "train", 32)
    assert list(dataset.unreadable([0])) == ["n01/a.jpg"]
    with pytest.raises(ValueError, match="a.jpg can't be read"):
        dataset.__getitems__([(0, 0)])


def test_huge_images(tmp_path, monkeypatch):
    """Broken: Pillow's guard against decompression bombs would end the run, or let one eat all memory."""
    (tmp_path / "train" / "n01").mkdir(parents=True)
    for name, side in (("a.png", 40), ("b.png", 50), ("c.png", 80)):
        stripes(size=(side, side)).save(tmp_path / "train" / "n01" / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40)  # above it a warning, above twice as much an error
    dataset = open_dataset(str(tmp_path), "train", 32)
    with pytest.warns(Image.DecompressionBombWarning):  # as above
        assert list(dataset.unreadable(range(3))) == ["n01/c.png"]


def test_speed_report(tmp_path):
    """Broken: python -m data.speed would not run, or Pillow's warnings would flood the terminal."""
    make_image_folder(tmp_path, 40)
    stripes("P").save(tmp_path / "train" / "d0" / "a.png", transparency=bytes([0, 9] * 128))  # of which Pillow warns
    def speed(*args):
        return subprocess.run([sys.executable, "-m", "data.speed", *args], cwd=ROOT, capture_output=True, text=True)
    finished = speed(str(tmp_path), "--image_size=32")
    assert finished.returncode == 0 and finished.stderr == "" and finished.stdout.count("images a second and core") == 4
    finished = speed(str(tmp_path / "none"))
    assert finished.returncode == 1 and finished.stderr.startswith("error: there is no folder")
    assert finished.stderr.count("\n") == 1


# --- crops -----------------------------------------------------------------------------------------------------------


def adm_center_crop(pil_image, image_size):
    """ADM's, as written there (openai/guided-diffusion, guided_diffusion/image_datasets.py)."""
    pil_image = pil_image.convert("RGB")
    while min(*pil_image.size) >= 2 * image_size:
        pil_image = pil_image.resize(tuple(x // 2 for x in pil_image.size), resample=Image.BOX)
    scale = image_size / min(*pil_image.size)
    pil_image = pil_image.resize(tuple(round(x * scale) for x in pil_image.size), resample=Image.BICUBIC)
    arr = np.array(pil_image)
    crop_y = (arr.shape[0] - image_size) // 2
    crop_x = (arr.shape[1] - image_size) // 2
    return arr[crop_y:crop_y + image_size, crop_x:crop_x + image_size]


def test_center_crop_is_adms():
    """Broken: stage 2 would learn from other pixels than those that ADM's statistics were made from."""
    random = np.random.default_rng(0)
    sizes = [(1, 1), (1, 99), (99, 1), (2, 150), (31, 32), (32, 32), (33, 32), (63, 64), (64, 64), (65, 127),
             (128, 129),
             (300, 3), (7, 690), (255, 256), (333, 500), *random.integers(1, 300, (100, 2)).tolist()]
    modes = ["RGB", "L", "CMYK", "RGBA", "P"]
    for i, size in enumerate(sizes):
        image = noise(size, modes[i % len(modes)], i)
        for side in (16, 31, 32):
            assert np.array_equal(np.asarray(center_crop(image, side)), adm_center_crop(image, side)), (size, side)
    for size in ((500, 375), (1023, 517), (513, 512), (200, 180)):
        file = Image.open(io.BytesIO(encoded(noise(size))))
        assert np.array_equal(np.asarray(center_crop(file, 256)), adm_center_crop(file, 256)), size


def test_strips_do_not_eat_memory(tmp_path):
    """Broken: an image of one row would be blown up to gigabytes, or its crop reach outside."""
    (tmp_path / "train" / "n01").mkdir(parents=True)
    for i, size in enumerate([(1, 60000), (60000, 1), (3, 1), (2, 4001)]):
        noise(size).save(tmp_path / "train" / "n01" / f"{i}.jpg")
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
            "from data import open_dataset\n"
            "for crop in ('center', 'random'):\n"
            "    dataset = open_dataset(sys.argv[1], 'train', 256, crop)\n"
            "    print(dataset.__getitems__([(i, 0) for i in range(4)])[0].shape)")
    finished = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert finished.stdout.split("\n")[:2] == ["torch.Size([4, 3, 256, 256])"] * 2, finished.stderr


def test_random_crops_are_places_in_the_resized_image():
    """Broken: a training crop would be stretched, lie elsewhere than drawn, or reach outside the image."""
    shades = np.stack(np.broadcast_arrays(*np.ogrid[0:1:90j, 0:1:140j], 0.5), axis=2)  # red and green tell the position
    image = Image.fromarray((shades * 255).round().astype(np.uint8))
    tops, lefts = set(), set()
    for seed in range(200):
        size = 40
        crop = np.asarray(random_crop(image.copy(), size, np.random.default_rng(seed))).astype(float)
        random = np.random.default_rng(seed)
        left, top = random.integers(62 - size + 1), random.integers(size - size + 1)  # the image becomes 62 x 40
        whole = np.asarray(image.resize((62, 40), Image.BICUBIC)).astype(float)[top:top + size, left:left + size]
        assert np.abs(crop - whole).max() <= 3
        tops.add(top), lefts.add(left)
    assert tops == {0} and lefts == set(range(23))
    sides = np.random.default_rng(0).integers(1, 400, (200, 2)).tolist()
    for i, (width, height) in enumerate(sides):
        crop = random_crop(Image.new("RGB", (width, height)), 1 + i % 70, np.random.default_rng(i))
        assert crop.size == (1 + i % 70,) * 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_large_jpegs_are_decoded_small(mode):
    """Broken: Pillow's draft would shift the training crops, or make them smaller than they have to be."""
    smooth = noise((20, 15)).resize((800, 600), Image.BICUBIC).convert(mode)
    content = encoded(smooth, quality=95)
    for seed in range(5):
        fast, slow = (random_crop(file, 128, np.random.default_rng(seed)) for file in
                      (Image.open(io.BytesIO(content)), Image.open(io.BytesIO(content)).convert("RGB")))
        assert fast.size == (128, 128)
        assert np.abs(np.asarray(fast).astype(float) - np.asarray(slow)).mean() < 2
