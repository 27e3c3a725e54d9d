"""Cached latents and texts equal fresh encodings, whatever happened while they were made."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from everydream.data import packs
from everydream.data.cache import (
    CAPTIONS_AT_ONCE,
    LatentCache,
    TextCache,
    build_latents,
    build_texts,
    pictures_at_once,
    pixels_of,
)
from everydream.data.dataset import Augmentation
from everydream.data.loader import Loader
from everydream.data.packs import Packs, PackWriter
from everydream.errors import DataError
from tests.data.pictures import encoded, png, write
from tests.data.sets import FACTOR, dataset_of, encode, encode_text, make_set, source_of

FLIPS = Augmentation(flip_p=0.5, cond_dropout=0.2)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_set(tmp_path_factory.mktemp("set"))
    write(folder, "05.yaml", "{caption: 'sks, tag 5, red, blue', flip_p: 1}")
    (folder / "05.txt").unlink()
    return folder


def files(cache_dir: Path) -> list[Path]:
    return sorted(path for path in cache_dir.rglob("*") if path.is_file())


def build(cache: LatentCache, source, encode=encode, **options) -> None:
    build_latents(cache, source.latent_requests(), encode, vae_factor=FACTOR, workers=2, **options)


def test_every_cached_latent_equals_a_fresh_encoding(folder: Path, tmp_path: Path) -> None:
    source = source_of(folder, 3, FLIPS)
    requests = source.latent_requests()
    assert len(requests) == 2 * 13 - 1 and len({request.size for request in requests}) >= 4
    cache = LatentCache(tmp_path, "vae")
    assert len(cache.missing(requests)) == len(requests)
    build(cache, source)
    again = LatentCache(tmp_path, "vae")
    assert again.missing(requests) == []
    for request in requests:
        pixels = pixels_of(request.sample, request.crop, request.size, request.flip, (255, 255, 255))
        fresh = torch.stack(encode(torch.from_numpy(pixels[None])), dim=1)[0]
        assert np.array_equal(again.moments(request), fresh.numpy())


def test_cached_batches_pair_with_their_pictures_and_captions(folder: Path, tmp_path: Path) -> None:
    source = source_of(folder, 3, FLIPS)
    latents, texts = LatentCache(tmp_path, "vae"), TextCache(tmp_path, "text")
    build(latents, source)
    build_texts(texts, source.captions(), encode_text)
    items = [("subject", index) for index in range(source.plan.micro_batches(6))]
    cached = dataset_of(source, latents=latents, texts=texts)
    seen = set()
    for plain, quick in zip(Loader(dataset_of(source), items), Loader(cached, items), strict=True):
        assert quick.pixels_BCHW is None and quick.tokens_BKL is None
        for field in ("identities", "captions", "crops", "flips", "epochs"):
            assert getattr(plain, field) == getattr(quick, field)
        assert torch.equal(plain.noise_BCHW, quick.noise_BCHW) and torch.equal(plain.t_B, quick.t_B)
        assert torch.equal(quick.moments_BMCHW, torch.stack(encode(plain.pixels_BCHW), dim=1))
        assert torch.equal(quick.text_BLD, encode_text(list(quick.captions)))
        seen |= set(zip(quick.identities, quick.flips, strict=True))
    assert len(seen) > 18  # both variants of most
    with Loader(cached, items, num_workers=2) as batches:
        for here, there in zip(Loader(cached, items), batches, strict=True):
            assert torch.equal(here.moments_BMCHW, there.moments_BMCHW) and torch.equal(here.text_BLD, there.text_BLD)


def test_what_is_made_ahead_from_caches_fails_in_its_place(folder: Path, tmp_path: Path) -> None:
    source = source_of(folder, 1)
    latents = LatentCache(tmp_path, "vae")
    build(latents, source)
    (pack,) = (tmp_path / "latents").rglob("*.safetensors")
    damaged = source.plan.micro_batch(2)[0].sample
    items = [("subject", index) for index in range(5)]
    loader = Loader(dataset_of(source, latents=latents), items)
    request = next(r for r in source.latent_requests() if r.sample.identity == damaged)
    place = pack.read_bytes().index(LatentCache(tmp_path, "vae").moments(request).tobytes())
    with open(pack, "r+b") as file:
        file.seek(place)
        file.write(bytes(16))
    assert [next(loader).identities[0] for _ in range(2)] == [source.plan.micro_batch(i)[0].sample for i in range(2)]
    with pytest.raises(DataError, match="damaged on disk"):
        next(loader)
    assert next(loader, None) is None


def test_masks_are_cached_with_their_latents(tmp_path: Path) -> None:
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[3:20, :9] = 255
    for name in ("a", "b"):
        write(tmp_path, f"set/{name}.png", png(32, 32))
    write(tmp_path, "set/a.mask.png", encoded(Image.fromarray(mask), "PNG"))
    source = source_of(tmp_path / "set", 2, FLIPS, masked_loss=True)
    cache = LatentCache(tmp_path / "cache", "vae")
    build(cache, source_of(tmp_path / "set", 2, FLIPS))  # the pictures alone, with no mask asked for
    assert len(cache.missing(source.latent_requests())) == 2
    build(cache, source)
    items = [("subject", index) for index in range(6)]
    (tmp_path / "set" / "a.mask.png").unlink()
    quick = [batch.mask_B1HW for batch in Loader(dataset_of(source, latents=cache), items)]
    write(tmp_path, "set/a.mask.png", encoded(Image.fromarray(mask), "PNG"))
    assert all(torch.equal(a, b.mask_B1HW) for a, b in zip(quick, Loader(dataset_of(source), items), strict=True))


def test_batches_of_the_encoder_have_one_size_for_each_shape(folder: Path, tmp_path: Path) -> None:
    shapes = Counter()

    def counted(pixels_BCHW: torch.Tensor):
        shapes[tuple(pixels_BCHW.shape)] += 1
        return encode(pixels_BCHW)

    build(LatentCache(tmp_path, "vae"), source_of(folder, 3, FLIPS), counted)
    assert all(shape[0] == pictures_at_once((shape[3], shape[2])) for shape in shapes)
    assert pictures_at_once((512, 512)) == 4 and pictures_at_once((2048, 2048)) == 1
    lengths = set()
    build_texts(TextCache(tmp_path, "t"), ["a", "b"], lambda texts: (lengths.add(len(texts)), encode_text(texts))[1])
    assert lengths == {CAPTIONS_AT_ONCE}


def test_the_same_content_under_another_name_is_found(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, "set/a.png", png(40, 30, seed=1))
    cache = LatentCache(tmp_path / "cache", "vae")
    build(cache, source_of(tmp_path / "set"))
    (tmp_path / "set" / "a.png").rename(tmp_path / "set" / "another.png")
    write(tmp_path, "set/copy.png", png(40, 30, seed=1))
    assert cache.missing(source_of(tmp_path / "set").latent_requests()) == []
    write(tmp_path, "set/copy.png", png(40, 30, seed=2))
    assert len(cache.missing(source_of(tmp_path / "set").latent_requests())) == 1


def test_another_model_size_or_colour_is_made_anew(folder: Path, tmp_path: Path) -> None:
    source = source_of(folder)
    build(LatentCache(tmp_path, "vae"), source)
    requests = source.latent_requests()
    assert LatentCache(tmp_path, "vae").missing(requests) == []
    assert len(LatentCache(tmp_path, "another vae").missing(requests)) == 13
    assert len(LatentCache(tmp_path, "vae", (0, 0, 0)).missing(requests)) == 13
    assert len(LatentCache(tmp_path, "vae").missing([replace(request, size=(64, 64)) for request in requests])) == 13


def test_shares_of_several_processes_make_the_whole(folder: Path, tmp_path: Path) -> None:
    source = source_of(folder, 3, FLIPS)
    whole, parts = LatentCache(tmp_path / "one", "vae"), LatentCache(tmp_path / "three", "vae")
    build(whole, source)
    for rank in range(3):
        build(parts, source, rank=rank, world=3)
        build_texts(TextCache(tmp_path / "three", "t"), source.captions(), encode_text, rank=rank, world=3)
    assert parts.missing(source.latent_requests()) == []
    assert TextCache(tmp_path / "three", "t").missing(source.captions()) == []
    for request in source.latent_requests():
        assert np.array_equal(whole.moments(request), parts.moments(request))


def test_progress_counts_all_and_an_exception_in_it_keeps_what_is_done(folder: Path, tmp_path: Path) -> None:
    source, cache = source_of(folder, 3, FLIPS), LatentCache(tmp_path, "vae")

    def stop(done: int, total: int) -> None:
        assert total == 25
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(cache, source, progress=stop)
    left = len(LatentCache(tmp_path, "vae").missing(source.latent_requests()))
    assert 0 < left < 25 - 8
    calls = []
    build(LatentCache(tmp_path, "vae"), source, progress=lambda done, total: calls.append((done, total)))
    assert calls[0] == (0, left) and calls[-1] == (left, left)
    assert LatentCache(tmp_path, "vae").missing(source.latent_requests()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from everydream.data import packs
from everydream.data.cache import LatentCache
from tests.data.sets import source_of
from tests.data.test_cache import FLIPS, build

packs._PACK_BYTES = 3000  # many small packs
written = []
replace = os.replace

def dying(*names):
    written.append(names)
    if len(written) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)

os.replace = dying
build(LatentCache(Path(sys.argv[2]), "vae"), source_of(Path(sys.argv[1]), 3, FLIPS))
"""


def test_a_build_killed_half_way_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, folder, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole = [path for path in files(tmp_path) if path.suffix == ".safetensors"]
    assert len(whole) == 3 and len(files(tmp_path)) == 4  # three packs, and a temporary file
    source = source_of(folder, 3, FLIPS)
    left = LatentCache(tmp_path, "vae").missing(source.latent_requests())
    assert 0 < len(left) < 25
    encodings = []
    build(LatentCache(tmp_path, "vae"), source, lambda pixels: (encodings.append(len(pixels)), encode(pixels))[1])
    fresh = LatentCache(tmp_path / "fresh", "vae")
    build(fresh, source)
    resumed = LatentCache(tmp_path, "vae")
    assert resumed.missing(source.latent_requests()) == []
    for request in source.latent_requests():
        assert np.array_equal(resumed.moments(request), fresh.moments(request))


TOGETHER = """
import sys
from pathlib import Path
from everydream.data import packs
from everydream.data.cache import LatentCache
from tests.data.sets import source_of
from tests.data.test_cache import FLIPS, build

packs._PACK_BYTES = 3000
cache = LatentCache(Path(sys.argv[2]), "vae")
source = source_of(Path(sys.argv[1]), 3, FLIPS)
print("ready", flush=True)
sys.stdin.readline()
build(cache, source)
assert cache.missing(source.latent_requests()) == []
"""


def test_two_builders_at_once_do_no_harm(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TOGETHER, folder, tmp_path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    source = source_of(folder, 3, FLIPS)
    cache, fresh = LatentCache(tmp_path, "vae"), LatentCache(tmp_path / "fresh", "vae")
    build(fresh, source)
    assert cache.missing(source.latent_requests()) == [] and not list(tmp_path.rglob("*.tmp"))
    for request in source.latent_requests():
        assert np.array_equal(cache.moments(request), fresh.moments(request))


# --- packs ---


def filled(folder: Path) -> dict[str, np.ndarray]:
    tensors = {f"{at:032x}": np.random.default_rng(at).normal(size=(at + 1, 3)).astype(np.float32) for at in range(5)}
    with PackWriter(folder) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return tensors


def test_a_pack_is_a_safetensors_file(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    tensors = filled(tmp_path)
    (path,) = files(tmp_path)
    assert {name: tensor.tolist() for name, tensor in load_file(path).items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


def test_a_pack_that_is_not_whole_is_not_used(tmp_path: Path) -> None:
    tensors = filled(tmp_path)
    (path,) = files(tmp_path)
    content = path.read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert Packs(tmp_path).load(tensors) == set(tensors)
    path.write_bytes(b"\xff" * len(content))
    assert Packs(tmp_path).load(tensors) == set(tensors)


def test_a_flipped_bit_is_found_when_read(tmp_path: Path) -> None:
    tensors = filled(tmp_path)
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))
    opened = Packs(tmp_path)
    assert not opened.load(tensors)
    *whole, damaged = sorted(tensors, key=lambda name: opened._places[name][1])
    assert all(np.array_equal(opened.read(name), tensors[name]) for name in whole)
    with pytest.raises(DataError, match="damaged on disk: delete it"):
        opened.read(damaged)


def test_a_flipped_bit_in_a_header_costs_a_new_pack_at_most(tmp_path: Path) -> None:
    tensors = filled(tmp_path)
    (path,) = files(tmp_path)
    content = path.read_bytes()
    for place in range(8 + int.from_bytes(content[:8], "little")):
        damaged = bytearray(content)
        damaged[place] ^= (0x40, 1)[place % 2]
        path.write_bytes(bytes(damaged))
        filled(tmp_path)
        opened = Packs(tmp_path)
        assert not opened.load(tensors), place
        for name, tensor in tensors.items():
            try:
                assert np.array_equal(opened.read(name), tensor), place
            except DataError as error:  # noqa: PERF203 each by itself
                assert "delete it" in str(error)  # its checksum is not the written one


def test_a_cache_that_is_cleared_under_way_is_still_read(tmp_path: Path) -> None:
    tensors = filled(tmp_path)
    opened, later = Packs(tmp_path), Packs(tmp_path)
    opened.load(tensors)
    later = pickle.loads(pickle.dumps(opened))
    for path in files(tmp_path):
        path.unlink()
    assert all(np.array_equal(opened.read(name), tensor) for name, tensor in tensors.items())
    with pytest.raises(DataError, match="start again, it is made anew"):
        later.read(next(iter(tensors)))


def test_packs_travel_to_workers_without_their_maps(tmp_path: Path) -> None:
    tensors = filled(tmp_path)
    opened = Packs(tmp_path)
    opened.load(tensors)
    name = next(iter(tensors))
    opened.read(name)
    sent = pickle.dumps(opened)
    assert len(sent) < 2500
    assert np.array_equal(pickle.loads(sent).read(name), tensors[name])


def test_a_full_disk_is_the_user_s_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packs.os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        filled(tmp_path)
    assert files(tmp_path) == []


def test_old_temporary_files_are_removed_and_fresh_ones_are_not(tmp_path: Path) -> None:
    old, fresh = write(tmp_path, "a.tmp", "x"), write(tmp_path, "b.tmp", "x")
    os.utime(old, (0, 0))
    filled(tmp_path)
    assert not old.exists() and fresh.exists()


def test_moving_crops_and_shuffled_tags_cannot_be_cached(folder: Path) -> None:
    with pytest.raises(AssertionError, match="moving crops"):
        source_of(folder, 3, Augmentation(crop_jitter=0.1)).latent_requests()
    assert source_of(folder, 3, Augmentation(shuffle_tags=True)).captions() is None
    assert "" in source_of(folder).captions()


def test_a_picture_that_vanished_is_named(tmp_path: Path) -> None:
    source = source_of(make_set(tmp_path / "set", 3))
    (tmp_path / "set" / "01.png").unlink()
    with pytest.raises(DataError, match=r"01\.png: cannot be read"):
        build(LatentCache(tmp_path / "cache", "vae"), source)


def test_a_picture_that_changed_since_the_scan_is_not_cached(tmp_path: Path) -> None:
    source = source_of(make_set(tmp_path / "set", 3))
    write(tmp_path, "set/01.png", png(32, 32, seed=77))
    with pytest.raises(DataError, match=r"01\.png: it is not what the check"):
        build(LatentCache(tmp_path / "cache", "vae"), source)


def test_numbers_that_are_not_finite_are_never_cached(folder: Path, tmp_path: Path) -> None:
    def broken(pixels_BCHW: torch.Tensor):
        return tuple(moment * float("nan") for moment in encode(pixels_BCHW))

    with pytest.raises(DataError, match="latents are not finite"):
        build(LatentCache(tmp_path, "vae"), source_of(folder), broken)
    with pytest.raises(DataError, match="embeddings are not finite"):
        build_texts(TextCache(tmp_path, "t"), ["a"], lambda captions: encode_text(captions) / 0.0)
    assert files(tmp_path) == []


def test_a_warm_cache_is_only_read(folder: Path, tmp_path: Path) -> None:
    source = source_of(folder)
    build(LatentCache(tmp_path, "vae"), source)
    before = [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))]

    def never(*inputs):
        raise AssertionError("encoded again")

    build(LatentCache(tmp_path, "vae"), source, never)
    assert [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))] == before


# --- with a real encoder ---


@pytest.fixture(scope="module")
def family(tiny_model: Path):
    from everydream.models.family import load, read_facts

    return load(read_facts(str(tiny_model)), train=())


DEMO = ROOT / "examples" / "demo"


@pytest.mark.parametrize("name", ["subject", "class"])
def test_the_demo_s_latents_and_texts_are_those_of_fresh_encodings(family, tmp_path: Path, name: str) -> None:
    """Fresh: each picture alone with copies of itself, so neighbours, places and padding do not matter either."""
    source = source_of(DEMO / name, 3, FLIPS, resolution=64)
    latents, texts = LatentCache(tmp_path, "vae"), TextCache(tmp_path, "text")
    requests, captions = source.latent_requests(), source.captions()
    assert len(requests) == 2 * len(source.samples) and len(captions) > 1

    def encode_captions(some: list[str]) -> torch.Tensor:
        return family.encode_text(torch.from_numpy(family.tokenize(some, 1)))

    with torch.no_grad():
        build(latents, source, family.encode_pixels)
        build_texts(texts, captions, encode_captions)
        for request in requests:
            pixels = pixels_of(request.sample, request.crop, request.size, request.flip, (255, 255, 255))
            copies = torch.from_numpy(np.stack([pixels] * pictures_at_once(request.size)))
            mean_BCHW, std_BCHW = family.encode_pixels(copies)
            cached = latents.moments(request)
            assert np.array_equal(cached[0], mean_BCHW[0].numpy()) and np.array_equal(cached[1], std_BCHW[0].numpy())
        for caption in captions:
            fresh = encode_captions([caption] * CAPTIONS_AT_ONCE)[0]
            assert np.array_equal(texts.text(caption), fresh.numpy())


def test_real_latents_do_not_depend_on_neighbours_or_shares(family, folder: Path, tmp_path: Path) -> None:
    source = source_of(folder, 3, FLIPS, resolution=64)
    requests = source.latent_requests()
    assert len({request.size for request in requests}) >= 3
    caches = [LatentCache(tmp_path / str(number), "vae") for number in range(3)]
    options = {"vae_factor": FACTOR, "workers": 2}
    with torch.no_grad():
        build_latents(caches[0], requests, family.encode_pixels, **options)
        for part in (requests[::3], requests[1::3], requests[2::3]):  # as interrupted builds would
            build_latents(caches[1], part[::-1], family.encode_pixels, **options)
        for rank in range(2):
            build_latents(caches[2], requests, family.encode_pixels, rank=rank, world=2, **options)
    for request in requests:
        one, *others = (cache.moments(request) for cache in caches)
        assert all(np.array_equal(one, other) for other in others)


def test_too_many_open_packs_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made anew at the next start they would be as many again."""
    with PackWriter(tmp_path) as writer:
        writer.add("a", np.zeros(3, np.float32))

    def refused(*_: object, **__: object) -> None:
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr(np, "memmap", refused)
    with pytest.raises(
        DataError, match=r"Too many open files\): allow more open files \(ulimit -n\), 0 packs are open"
    ):
        Packs(tmp_path).load(["a"])
