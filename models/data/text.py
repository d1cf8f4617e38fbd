"""Any text file as parallel streams of characters; Python's own library where there is none."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_text(path: str | Path | None) -> str:
    """The characters of a UTF-8 file, line ends as they are; without a path the source of Python's own library.

    ValueError for a file that is missing, empty, or no text in UTF-8.
    """
    if path is None:
        return _library_source()
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path} is empty: there is nothing to learn from")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8 (byte {data[error.start]:#04x} at position {error.start}): "
            "if it is text in another encoding, convert it, for example with iconv"
        ) from error
    if "\0" in text:
        raise ValueError(f"{path} is a binary file, no text: it has a zero byte at position {data.index(0)}")
    return text


def _library_source() -> str:
    """The top-level modules of the standard library, by name; about five million characters."""
    folder = Path(os.__file__).parent
    files = sorted(folder.glob("*.py"))
    if not files:
        raise ValueError(f"{folder} holds no source of Python's library to learn from: name a text file with --text")
    return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def encode(text: str) -> tuple[str, Tensor]:
    """(the text's distinct characters in order, the index of each of its characters among them: int64 [n])"""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    distinct, indices = np.unique(points, return_inverse=True)
    return "".join(map(chr, distinct)), torch.from_numpy(indices.reshape(-1))


class TextStreams:
    """A text cut for truncated BPTT as char-rnn cuts it: `streams` parallel streams of consecutive chunks.

    The text, without its last few characters, is laid out in `streams` rows, and the rows are cut into chunks of
    `unroll` characters. Chunk i+1 goes on where chunk i stops, in every stream. The first chunks are for
    training; then come the share `validation` and the share `test`.

    characters: int64 [n]. ValueError if the text is too short for these sizes, or a share is out of range.
    """

    def __init__(self, characters: Tensor, streams: int, unroll: int, validation: float, test: float = 0.0):
        if min(streams, unroll) < 1:
            raise ValueError(f"streams={streams}, unroll={unroll}: both must be at least 1")
        if not (0 < validation < 1 and 0 <= test < 1 and validation + test < 1):
            raise ValueError(f"validation={validation}, test={test}: must be shares of the text that leave a rest")
        count = (len(characters) - 1) // (streams * unroll)  # each chunk needs the character behind it, too
        training = int(count * (1 - validation - test) + 1e-6)
        # As in char-rnn, the last share takes what rounding leaves.
        validating = int(count * validation + 1e-6) if test else count - training
        testing = count - training - validating
        if not (training and validating and (testing or not test)):
            raise ValueError(
                f"the text of {len(characters):,} characters is too short for {streams} streams in chunks of {unroll} "
                f"characters: it gives {count} chunks, too few to train on, to validate"
                f"{' and to test' if test else ''}. Use a longer text, or a smaller batch size or unroll"
            )
        used = characters[: count * streams * unroll + 1]
        self.inputs = used[:-1].view(streams, count, unroll).permute(1, 2, 0).contiguous()
        self.targets = used[1:].view(streams, count, unroll).permute(1, 2, 0).contiguous()
        self.training = range(training)
        self.validation = range(training, training + validating)
        self.test = range(count - testing, count)

    def __getitem__(self, chunk: int) -> tuple[Tensor, Tensor]:
        """(characters, the character that follows each): int64 [unroll, streams]"""
        return self.inputs[chunk], self.targets[chunk]
