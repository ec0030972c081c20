"""Small stand-ins for face sets: every person has a pattern, every photograph its noise."""

from __future__ import annotations

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image

from tgeo_jax.data import faces


def pixels(person: int, number: int, height: int, width: int, channels: int) -> np.ndarray:
    """Of one photograph; the blocks of a person's pattern are 16 pixels wide."""
    own = np.random.RandomState(person).randint(30, 226, (height // 16 + 1, width // 16 + 1))
    pattern = np.kron(own, np.ones((16, 16)))[:height, :width, None]
    noise = np.random.RandomState(1000 * person + number).randint(
        -25, 26, (height, width, channels)
    )
    return (pattern + noise).astype(np.uint8)


def encoded(image: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, kind)
    return file.getvalue()


def orl_files() -> dict[str, bytes]:
    """In the layout of ORL: 40 people, 10 photographs of each."""
    return {
        f"s{person}/{number}.pgm": encoded(pixels(person, number, 112, 92, 1), "PPM")
        for person in range(1, 41)
        for number in range(1, 11)
    }


def write_orl(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"orl_faces/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_folder(root: pathlib.Path, *, people: int = 5, photos: int = 6) -> pathlib.Path:
    """In the layouts of CASIA-WebFace and LFW; four others have three photographs each."""
    for person in range(people):
        folder = root / "train" / f"{person:07d}"
        folder.mkdir(parents=True)
        for number in range(1, photos + 1):
            image = pixels(person, number, 112, 112, 3)
            (folder / f"{number:03d}.jpg").write_bytes(encoded(image, "JPEG"))
    names = ["Ada_Lovelace", "Emmy_Noether", "Mary_Somerville", "Sofja_Kowalewskaja"]
    for person, name in enumerate(names, 100):
        (root / "evaluation" / name).mkdir(parents=True)
        for number in range(1, 4):
            image = pixels(person, number, 60, 50, 3)  # of another size
            file = root / "evaluation" / name / f"{name}_{number:04d}.png"
            file.write_bytes(encoded(image, "PNG"))
    lines = ["2\t2"]
    for a, b in (names[:2], names[2:]):
        lines += [f"{a}\t1\t2", f"{b}\t2\t3", f"{a}\t1\t{b}\t1", f"{a}\t2\t{b}\t2"]
    (root / "pairs.txt").write_text("\n".join(lines) + "\n")
    return root


def prepare(data_dir: str) -> None:
    """Both sets, from stand-ins."""
    folder = pathlib.Path(data_dir)
    archive = write_orl(folder / "orl_faces.tar.gz", orl_files())
    faces.prepare("orl_faces", archive, data_dir)
    faces.prepare("face_folder", write_folder(folder / "face_source"), data_dir)
