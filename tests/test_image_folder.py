"""Folders of images: which files and classes they hold, files of every kind, and the crops."""
import io
import os
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from data import open_dataset
from data.image_folder import center_crop, random_crop, read_image
from tests.scripts import on_ranks


def stripes(mode="RGB", size=(48, 32)):
    """Left half red, right half green."""
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 255, 0), (size[0] // 2, 0, *size))
    return image.convert(mode)


def noise(size, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A function that writes images below train/, {name: PIL image or bytes}, and opens it as a dataset."""
    def write(files, image_size=32, **options):
        for name, content in files.items():
            path = tmp_path / "train" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else encoded(content, "PNG"))
        return open_dataset(str(tmp_path), "train", image_size, **options)
    return write


def test_classes_are_folders(folder, tmp_path, capsys):
    """Fails if labels are not indices into the sorted class names, if hidden files, texts or images outside a class
    folder are used, if what is left out is not counted, or if a link that leads back is followed. A class name of
    macOS (NFD) is the same in NFC."""
    red, blue = Image.new("RGB", (80, 50), (255, 0, 0)), Image.new("RGB", (33, 32), (0, 0, 255))
    composed, apart = (unicodedata.normalize(form, "caf\xe9") for form in ("NFC", "NFD"))
    files = {"n02/c.png": blue, "n01/a.png": red, "n01/deep/b.PNG": red, f"{composed}/d.jpg": encoded(blue),
             f"{apart}/e.png": blue}
    others = {"n01/._a.png": b"", "n01/.thumbnails/a.png": red, ".hidden/a.png": red, "n01/png": b"",
              "outside.png": red, "empty/notes.txt": b"", "tiff/a.tif": b""}
    (tmp_path / "linked").mkdir()
    blue.save(tmp_path / "linked" / "z.png")
    (tmp_path / "train" / "n02").mkdir(parents=True)
    (tmp_path / "train" / "n02" / "link").symlink_to(tmp_path / "linked")
    (tmp_path / "train" / "n02" / "back").symlink_to(tmp_path / "train")
    train = folder(files | others, crop="random", flip=True, seed=1)
    said = capsys.readouterr().out
    assert "6 images in 3 classes; left out: " in said and "1 .tif" in said and "1 outside a class" in said
    assert train.class_names == [composed, "n01", "n02"] and train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    images, labels = train.__getitems__([(4, 0), (2, 0), (3, 0)])
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8 and labels.tolist() == [2, 1, 1]
    assert (images.float().mean((2, 3))[[0, 1, 2], [2, 0, 0]] > 250).all()
    shutil.copytree(tmp_path / "train", tmp_path / "val", symlinks=True)
    assert open_dataset(str(tmp_path), "test", 32).root == str(tmp_path / "val")


def test_a_folder_without_images_is_refused(tmp_path):
    """Fails if a folder without images is accepted."""
    for folder in (tmp_path, tmp_path / "train" / "n01"):
        folder.mkdir(parents=True, exist_ok=True)
        with pytest.raises(ValueError, match="train.*CLASS/NAME.JPEG"):
            open_dataset(str(tmp_path), "train", 32)


def test_the_fingerprint_changes_with_the_files(folder, tmp_path):
    """Fails if a training resumes on images of other names, if tokens of other images are used again, even of images
    with the same names and sizes, if a copy of a folder counts as another folder, or if the ranks read it otherwise."""
    files = {f"n0{i % 2}/{i}.bmp": encoded(noise((50, 50), seed=i), "BMP") for i in range(6)}
    first = folder(files).fingerprint()
    shutil.copytree(tmp_path / "train", tmp_path / "copy" / "train", copy_function=shutil.copyfile)  # with other times
    assert open_dataset(str(tmp_path / "copy"), "train", 64).fingerprint() == first
    names, contents = map(set, zip(first.split(), strict=True))
    for changed in (files["n00/0.bmp"] + b"0", encoded(noise((50, 50), seed=7), "BMP")):
        found = folder({"n00/0.bmp": changed}).fingerprint().split()
        assert found[0] in names and found[1] not in contents
        contents.add(found[1])
    for old, new in (("n00/0.bmp", "n00/9.bmp"), ("n00", "n02")):
        (tmp_path / "train" / old).rename(tmp_path / "train" / new)
        names.add(folder({}).fingerprint().split()[0])
    os.remove(tmp_path / "train" / "n02" / "9.bmp")
    assert len(names | {folder({}).fingerprint().split()[0]}) == 4
    assert on_ranks(2, lambda: folder({}).fingerprint()) == 2 * [folder({}).fingerprint()]


def test_rotation_and_alpha_are_applied(folder):
    """Fails if a photo lies on its side, or if what is transparent is black or has a colour that nobody has seen."""
    rotated, ink = Image.Exif(), Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    rotated[0x0112] = 6  # "turn by 90 degrees": the left side becomes the top
    ink.paste((0, 0, 0, 255), (0, 0, 16, 32))
    photo = encoded(stripes(size=(32, 32)), "PNG", exif=rotated)
    dataset = folder({"a/0.png": photo, "a/1.png": ink})
    top, ink = (dataset.read(index, 0) for index in range(2))
    assert top[5, 5].tolist() == top[5, 25].tolist() == [255, 0, 0] and top[25, 5].tolist() == [0, 255, 0]
    assert ink[5, 5].tolist() == [0, 0, 0] and ink[5, 25].tolist() == [255, 255, 255]
    assert np.array_equal(read_image(dataset.path(0), 32, 3), top)


@pytest.mark.filterwarnings("ignore:Palette images")  # pytest shows what data.image_folder has silenced
def test_files_of_every_kind(folder):
    """Fails if a file of this kind has other colours, or ends the training."""
    two = dict(save_all=True, append_images=[Image.new("RGB", (48, 32), (0, 0, 255))])
    faint = stripes("RGBA")
    faint.putalpha(250)
    sixteen_bits = Image.fromarray(np.repeat([[200 * 256] * 24 + [40 * 256 + 255] * 24], 32, axis=0).astype(np.uint16))
    colour = [encoded(stripes()), encoded(stripes(), progressive=True), encoded(stripes("CMYK")), stripes(), faint,
              encoded(stripes(), "WEBP"), encoded(stripes(), "WEBP", **two),
              encoded(stripes(), "BMP"), encoded(stripes(), "PNG", **two), stripes("P"),
              *[encoded(stripes("P"), "PNG", transparency=which) for which in (255, bytes([255, 250] * 128))]]
    files = colour + [encoded(stripes("L")), stripes("L"), stripes("LA"), sixteen_bits, stripes("1")]
    expected = [((255, 0, 0), (0, 255, 0))] * len(colour) + [((76,) * 3, (150,) * 3)] * 3 + [((200,) * 3, (40,) * 3)]
    suffixes = ["jpg", "JPEG", "Jpg", "webp", "BMP", "png"]  # which need not be those of the contents
    names = [f"a/{i:02}.{suffixes[i % 6]}" for i in range(len(files))]
    for crop in ("center", "random"):
        images = folder(dict(zip(names, files)), crop=crop).__getitems__([(i, 0) for i in range(len(files))])[0].float()
        for i, colours in enumerate(expected):  # the last file, of one bit, has no such colours
            for x, side in ((1, 0), (30, 1)) if crop == "center" else ():
                assert (images[i, :, 5:27, x].mean(1) - torch.tensor(colours[side])).abs().max() < 12, names[i]
            assert min((images[i, :, 16, x] - torch.tensor(c)).abs().max() for x in (4, 28) for c in colours) < 12


@pytest.mark.parametrize("kind, mode, options", [
    ("JPEG", "RGB", {}), ("JPEG", "CMYK", {"progressive": True}), ("JPEG", "L", {"restart_marker_blocks": 3}),
    ("PNG", "RGB", {}), ("WEBP", "RGB", {}), ("BMP", "RGB", {})])
def test_damaged_files_are_found(kind, mode, options, folder):
    """Fails if a truncated image is trained on or ends in a traceback, or if Pillow opens a file of another format, for
    which it may start a program such as Ghostscript."""
    whole = encoded(noise((120, 90), mode), kind, **options)
    ends = sorted({*np.linspace(0, len(whole), 12).astype(int).tolist(), len(whole) - 30})
    for crop in ("center", "random"):
        others = {"a/x.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a/y.jpg": encoded(stripes(), "GIF")}
        dataset = folder({f"a/{end:06}.jpg": whole[:end] for end in ends} | others, crop=crop)
        dataset.read(len(ends) - 1, 0)  # the whole file
        for i in [*range(len(ends) - 1), len(ends), len(ends) + 1]:
            with pytest.raises(ValueError, match=f"{dataset.path(i)} can't be read [(][^\n]*[)]; replace it by"):
                dataset.read(i, 0)


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
    """Fails if stage 2 is trained on other pixels than those of ADM's reference statistics."""
    sizes = [(1, 1), (1, 99), (99, 1), (2, 150), (31, 32), (32, 32), (33, 32), (63, 64), (64, 64), (65, 127),
             (128, 129), (300, 3), (7, 690), (255, 256), (333, 500),
             *np.random.default_rng(0).integers(1, 300, (40, 2)).tolist()]
    modes = ["RGB", "L", "CMYK", "RGBA", "P"]
    for i, size in enumerate(sizes):
        image = noise(size, modes[i % len(modes)], i)
        for side in (16, 31, 32):
            assert np.array_equal(np.asarray(center_crop(image, side)), adm_center_crop(image, side)), (size, side)
    for size in ((500, 375), (1023, 517), (513, 512), (200, 180)):
        file = Image.open(io.BytesIO(encoded(noise(size))))
        assert np.array_equal(np.asarray(center_crop(file, 256)), adm_center_crop(file, 256)), size


def test_crop_and_flip_depend_on_seed_epoch_and_index_only(folder):
    """Fails if a resumed run has other crops, or if every epoch has the same ones."""
    files = {"a/0.png": noise((700, 70)), "a/1.png": noise((700, 70))}
    datasets = [folder(files, crop="random", flip=True, seed=seed) for seed in range(3)]
    keys = [(seed, index, epoch) for seed in range(3) for index in range(2) for epoch in range(3)]
    found = {key: datasets[key[0]].read(*key[1:]).tobytes() for key in keys}
    assert len(set(found.values())) > 15  # of 18 draws, a few may agree by chance
    for seed, index, epoch in reversed(keys):
        batch = datasets[seed].__getitems__([(index, epoch), (0, 7)])[0]
        assert batch[0].permute(1, 2, 0).numpy().tobytes() == found[seed, index, epoch]
    plain, flipped = (folder(files, flip=flip) for flip in (False, True))
    mirrored = {np.array_equal(flipped.read(0, epoch), plain.read(0, 0)[:, ::-1]) for epoch in range(20)}
    assert mirrored == {True, False} and np.array_equal(plain.read(0, 0), plain.read(0, 5))


def test_random_crops_are_parts_of_the_resized_image():
    """Fails if a training crop is distorted, at another position than drawn, or reaches outside the image."""
    shades = np.stack(np.broadcast_arrays(*np.ogrid[0:1:90j, 0:1:140j], 0.5), axis=2)  # red and green tell the position
    image = Image.fromarray((shades * 255).round().astype(np.uint8))
    whole = np.asarray(image.resize((62, 40), Image.BICUBIC)).astype(float)
    lefts = set()
    for seed in range(150):
        crop = np.asarray(random_crop(image.copy(), 40, np.random.default_rng(seed))).astype(float)
        left = np.random.default_rng(seed).integers(62 - 40 + 1)
        assert np.abs(crop - whole[:, left:left + 40]).max() <= 3
        lefts.add(left)
    assert lefts == set(range(23))


def test_large_jpegs_are_decoded_small():
    """Fails if Pillow's draft mode shifts or shrinks the training crops."""
    content = encoded(noise((20, 15)).resize((800, 600), Image.BICUBIC), quality=95)
    fast, slow = (random_crop(file, 128, np.random.default_rng(0)) for file in
                  (Image.open(io.BytesIO(content)), Image.open(io.BytesIO(content)).convert("RGB")))
    assert fast.size == (128, 128) and np.abs(np.asarray(fast).astype(float) - np.asarray(slow)).mean() < 2
