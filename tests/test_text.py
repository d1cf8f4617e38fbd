import ast
from pathlib import Path

import pytest
import torch
from backstride.models.data.text import TextStreams, encode, read_text


def test_any_utf8_text_is_kept_as_it_is(tmp_path: Path):
    text = "Grüße,\r\nмир 世界 🙂\n"
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    assert read_text(path) == text
    vocabulary, characters = encode(text)
    assert vocabulary == "".join(sorted(set(text)))
    assert characters.dtype == torch.int64
    assert "".join(vocabulary[index] for index in characters.tolist()) == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty: there is nothing to learn from"),
        ("naïve".encode("latin-1"), r"is no text in UTF-8 \(byte 0xef at position 2\): .* convert it"),
        (b"\x7fELF\x02\x01\x01\x00\x00", "is a binary file, no text: it has a zero byte at position 7"),
    ],
)
def test_files_that_are_no_text(data, message, tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"text\.txt {message}"):
        read_text(path)
    with pytest.raises(ValueError, match="is not a file"):
        read_text(tmp_path)


def test_default_text_is_python():
    text = read_text(None)
    assert len(text) > 1_000_000 and "def " in text
    assert text == read_text(None)
    ast.parse(text[: text.index("\ndef ")])  # it begins with a whole module's head


def test_no_library_source(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("backstride.models.data.text.os.__file__", str(tmp_path / "os.pyc"))
    with pytest.raises(ValueError, match="holds no source of Python's library .* --text"):
        read_text(None)


def test_streams_cover_the_text_in_order():
    characters = torch.arange(3 * 4 * 10 + 7)
    streams = TextStreams(characters, 3, 4, validation=0.2, test=0.1)
    assert (streams.training, streams.validation, streams.test) == (range(7), range(7, 9), range(9, 10))
    inputs, targets = (torch.cat([streams[chunk][part] for chunk in range(10)]) for part in (0, 1))
    assert streams[0][0].shape == (4, 3)
    # Stream by stream the text without its end; every target is the character after its input.
    assert torch.equal(inputs.T.flatten(), characters[:120])
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize(
    ("length", "shares", "sizes"),
    [
        # char-rnn's own count of batches for tinyshakespeare, with its defaults and with a test set.
        (1115394, (0.05, 0.0), (423, 23, 0)),
        (1115394, (0.05, 0.05), (401, 22, 23)),
        (2 * 2500 + 1, (0.05, 0.0), (1, 1, 0)),
        (10 * 2500 + 1, (0.1, 0.1), (8, 1, 1)),
    ],
)
def test_shares(length, shares, sizes):
    streams = TextStreams(torch.zeros(length, dtype=torch.int64), 50, 50, *shares)
    assert (len(streams.training), len(streams.validation), len(streams.test)) == sizes


def test_too_short_texts_and_wrong_sizes():
    def cut(length: int, *arguments, **shares) -> TextStreams:
        return TextStreams(torch.zeros(length, dtype=torch.int64), *arguments, **shares)

    with pytest.raises(ValueError, match=r"5,000 characters is too short for 50 streams .* it gives 1 chunks"):
        cut(5000, 50, 50, validation=0.05)
    with pytest.raises(ValueError, match=r"to validate and to test\. Use a longer text, or a smaller batch size"):
        cut(5001, 50, 50, validation=0.3, test=0.3)
    for shares in ({"validation": 0.0}, {"validation": 0.5, "test": 0.5}, {"validation": 0.5, "test": -0.1}):
        with pytest.raises(ValueError, match="must be shares of the text"):
            cut(5001, 50, 50, **shares)
    with pytest.raises(ValueError, match="unroll=0: both must be at least 1"):
        cut(5001, 50, 0, validation=0.5)
