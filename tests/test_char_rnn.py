import json
import math
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backstride.models.data.text import read_text
from backstride.models.language.char_rnn import CharRNN
from backstride.models.training.checkpoint import load_weights, read_metadata, save_weights
from backstride.models.training.config import CharRNNConfig
from backstride.models.training.language import CharRNNTask, evaluate, load_network, open_text
from backstride.models.training.train import make_optimizer, train
from rich.console import Console
from torch import Tensor, nn

from .killed_runs import contents
from .models_base import without_interpreter
from .test_cli import command, run_cli

QUIET = Console(quiet=True)
TEXT = "".join(f"{a} times {b} is {a * b}.\n" for a in range(1, 20) for b in range(1, 20))


@pytest.fixture
def config(tmp_path: Path) -> CharRNNConfig:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return CharRNNConfig(
        text=str(path), width=8, batch_size=3, unroll=5, steps=6, every=2, validation=0.1, dropout=0.2, ops="torch"
    )


def make_task(config: CharRNNConfig, **changes) -> CharRNNTask:
    streams, config = open_text(replace(config, **changes))
    return CharRNNTask(config, streams)


@pytest.mark.parametrize(
    ("vocabulary", "options", "count"),
    [
        (65, {}, 66_369),  # char-rnn's own print of its 2 x 128 vanilla RNN on tinyshakespeare
        (65, {"layers": 1, "width": 100}, 23_165 + 100),  # min-char-rnn has one bias in the recurrence, we have two
        (4, {"layers": 1, "width": 3, "bias": False}, 33),
        (65, {"embedding": 64}, 66_369 - 128 + 65 * 64),
    ],
)
def test_parameter_count(vocabulary, options, count):
    network = CharRNN(vocabulary, **options)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_it_is_the_recurrence_of_its_docstring():
    torch.manual_seed(0)
    network = CharRNN(5, layers=2, width=3, ops="torch").double()
    indices, hidden = torch.randint(5, (4, 2)), torch.randn(2, 2, 3, dtype=torch.float64)
    p = network.rnn
    h = list(hidden)
    expected = []
    for x in F.one_hot(indices, 5).double():
        for layer, (w_ih, w_hh, b_ih, b_hh) in enumerate(p.all_weights):
            h[layer] = torch.tanh(x @ w_ih.T + b_ih + h[layer] @ w_hh.T + b_hh)
            x = h[layer]
        expected.append(x @ network.classifier.weight.T + network.classifier.bias)
    logits, last = network(indices, hidden)
    torch.testing.assert_close(logits, torch.stack(expected))
    torch.testing.assert_close(last, torch.stack(h))
    assert torch.equal(network(indices)[0], network(indices, torch.zeros_like(hidden))[0])


def test_the_state_goes_on_where_the_text_was_left():
    network = CharRNN(5, width=6, ops="torch")
    indices = torch.randint(5, (9, 2))
    whole, last = network(indices)
    first, hidden = network(indices[:4])
    rest, end = network(indices[4:], hidden)
    torch.testing.assert_close(torch.cat([first, rest]), whole)
    torch.testing.assert_close(end, last)


def test_an_embedding_is_a_linear_map_of_the_one_hot_vector():
    network = CharRNN(7, embedding=4, width=5, layers=1, ops="torch")
    assert network.embedding is not None
    twin = CharRNN(7, width=5, layers=1, ops="torch")
    twin.load_state_dict(
        {name: value for name, value in network.state_dict().items() if "embedding" not in name}
        | {"rnn.weight_ih_l0": network.rnn.weight_ih_l0 @ network.embedding.weight.T}
    )
    indices = torch.randint(7, (6, 3))
    torch.testing.assert_close(network(indices)[0], twin(indices)[0])


def test_initialisation_and_dropout():
    torch.manual_seed(0)
    network = CharRNN(40, width=50, dropout=0.5, ops="torch")
    for parameter in network.parameters():
        assert parameter.abs().max() <= 0.08
        # The variance of a uniform distribution, within five standard errors.
        assert parameter.var().item() == pytest.approx(0.08**2 / 3, rel=5 * (0.8 / parameter.numel()) ** 0.5)
    indices = torch.randint(40, (6, 3))
    assert not torch.equal(network(indices)[0], network(indices)[0])
    network.eval()
    assert torch.equal(network(indices)[0], network(indices)[0])
    one_layer = CharRNN(4, layers=1, dropout=0.5, ops="torch")  # without torch's warning
    assert not torch.equal(one_layer(indices % 4)[0], one_layer(indices % 4)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": 0}, "vocabulary=0"),
        ({"layers": 0}, "layers=0"),
        ({"width": 0}, "width=0"),
        ({"embedding": -1}, "embedding=-1"),
        ({"ops": "cudnn"}, r"ops='cudnn' .*\"fused\" .* \"torch\""),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        CharRNN(**({"vocabulary": 4} | options))


@pytest.mark.parametrize("indices", [torch.zeros(3, dtype=torch.int64), torch.zeros(3, 2)])
def test_wrong_indices(indices):
    with pytest.raises(ValueError, match=r"expected indices of characters \[T, N\]"):
        CharRNN(4)(indices)


def test_save_and_load(tmp_path: Path):
    network, other = (CharRNN(5, width=6, embedding=3, ops="torch") for _ in range(2))
    save_weights(network, tmp_path / "w.safetensors", {"step": 1})
    load_weights(other, tmp_path / "w.safetensors")
    indices = torch.randint(5, (4, 2))
    assert torch.equal(network(indices)[0], other(indices)[0])


@pytest.mark.parametrize("embedding", [0, 3])
def test_both_ops_train_to_the_same_losses(config, tmp_path: Path, monkeypatch, embedding):
    monkeypatch.setattr("backstride.models.training.language.SAMPLE_LENGTH", 5)
    (tmp_path / "text.txt").write_text(TEXT[:300])
    config = replace(config, dropout=0.0, embedding=embedding, width=5, batch_size=2, unroll=4, clip=0.5)
    losses = []
    for ops in ("fused", "torch"):
        task = make_task(config, ops=ops)
        task.network.double()
        task.hidden = task.hidden.double()
        history = train(task, task.config, tmp_path / ops, console=QUIET)
        losses.append([value for _, value in history["train"]] + [value for _, value in history["validation"]])
    assert losses[1][5] < losses[1][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_batches_go_through_the_text_and_the_state_is_carried(config):
    task = make_task(config, dropout=0.0)
    epoch = task.config.epoch
    characters = torch.tensor([task.config.vocabulary.index(character) for character in TEXT])
    row = (len(TEXT) - 1) // 15 * 5
    inputs, targets = task.batch(1)
    for stream in range(3):
        start = stream * row + 5
        assert torch.equal(inputs[:, stream], characters[start : start + 5])
        assert torch.equal(targets[:, stream], characters[start + 1 : start + 6])
    assert torch.equal(task.batch(epoch + 1)[0], inputs) and not torch.equal(task.batch(0)[0], inputs)

    task.loss(task.batch(0))
    assert not task.hidden.requires_grad
    separate = task.loss(task.batch(1)).item()
    joined = torch.cat([task.batch(0)[0], inputs])
    logits, _ = task.network(joined)
    assert separate == pytest.approx(F.cross_entropy(logits[5:].flatten(0, 1), targets.flatten()).item(), rel=1e-6)


def test_validation_loss_is_that_of_the_text_in_one_piece(config):
    task = make_task(config)
    task.network.eval()
    metrics = task.validate()
    chunks = [task.streams[chunk] for chunk in task.streams.validation]
    characters, targets = (torch.cat([chunk[part] for chunk in chunks]) for part in (0, 1))
    with torch.no_grad():
        logits, _ = task.network(characters)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert metrics["validation"] == pytest.approx(expected, rel=1e-6)
    assert metrics["bits_per_character"] == pytest.approx(expected / math.log(2), rel=1e-6)


def test_context_is_read_but_does_not_count(config):
    task = make_task(config)
    network, streams = task.network.eval(), task.streams
    chunks = range(7, 9)
    characters, targets = (torch.cat([streams[chunk][part] for chunk in range(4, 9)]) for part in (0, 1))
    with torch.no_grad():
        logits, _ = network(characters)
    expected = F.cross_entropy(logits[3 * 5 :].flatten(0, 1), targets[3 * 5 :].flatten()).item()
    assert evaluate(network, streams, chunks, 3) == pytest.approx(expected, rel=1e-6)
    assert evaluate(network, streams, chunks) != pytest.approx(expected, rel=1e-6)
    # There is nothing before the beginning of the text.
    assert evaluate(network, streams, range(2, 4), 9) == evaluate(network, streams, range(2, 4), 2)


def test_published_settings():
    """The defaults are those of char-rnn's train.lua."""
    config = CharRNNConfig(epoch=423)
    assert (config.batch_size, config.unroll, config.layers, config.width, config.dropout) == (50, 50, 2, 128, 0)
    optimizer = make_optimizer(nn.Linear(1, 1), config)
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert (optimizer.param_groups[0]["alpha"], optimizer.param_groups[0]["eps"]) == (0.95, 1e-8)
    # The rate falls at the end of the tenth epoch and of each one after it.
    rates = [config.learning_rate(step) for step in (0, 423 * 10 - 1, 423 * 10, 423 * 11 - 1, 423 * 11, 423 * 50 - 1)]
    assert rates == pytest.approx([0.002 * 0.97**power for power in (0, 0, 1, 1, 2, 40)])
    # Clamped at 5 where the loss is a sum over 50 time steps, so at 0.1 for their mean.
    assert config.largest_gradient == pytest.approx(0.1)
    assert replace(config, clip=0.0).largest_gradient == math.inf


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped(config, tmp_path: Path, precision):
    def largest(clip: float) -> float:
        """The largest element of the gradient with which the first step was done."""
        task = make_task(config, clip=clip, precision=precision, steps=1)
        train(task, task.config, tmp_path / str(clip), console=QUIET)
        return max(parameter.grad.abs().max().item() for parameter in task.network.parameters())

    free = largest(0.0)
    assert largest(0.5 * free * config.unroll) == pytest.approx(0.5 * free)
    assert largest(2 * free * config.unroll) == pytest.approx(free)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": 0.0}, "decay=0.0"),
        ({"decay_after": 0}, "decay_after=0"),
        ({"unroll": 0}, "unroll=0"),
        ({"clip": -1.0}, "clip=-1.0"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        CharRNNConfig(**change)


class Stop(Exception):
    pass


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "rmsprop"), ("bf16", "adamw")])
def test_an_interrupted_run_resumes_bitwise(config, tmp_path: Path, precision, optimizer):
    """With dropout, so that the random numbers count; and the carried state counts in any case."""
    config = replace(config, precision=precision, optimizer=optimizer)
    whole_task = make_task(config)
    whole = train(whole_task, whole_task.config, tmp_path / "whole", console=QUIET)
    interrupted = make_task(config)
    loss, calls = interrupted.loss, []

    def stop_at_six(batch: tuple[Tensor, ...]) -> Tensor:
        calls.append(batch)
        if len(calls) == 6:
            raise Stop
        return loss(batch)

    interrupted.loss = stop_at_six
    with pytest.raises(Stop):
        train(interrupted, interrupted.config, tmp_path / "parts", console=QUIET)
    assert read_metadata(tmp_path / "parts" / "last.safetensors")["step"] == 4
    resumed_task = make_task(config)
    resumed = train(resumed_task, resumed_task.config, tmp_path / "parts", resume=True, console=QUIET)
    assert resumed == whole
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_run_goes_on_with_its_own_text_only(config, tmp_path: Path):
    task = make_task(config)
    train(task, task.config, tmp_path / "run", console=QUIET)
    (tmp_path / "text.txt").write_text(TEXT.replace("times", "timed"))
    task = make_task(config)
    with pytest.raises(ValueError, match=r"can only be resumed .* digest is"):
        train(task, task.config, tmp_path / "run", resume=True, console=QUIET)


def test_it_learns_and_loads(config, tmp_path: Path):
    task = make_task(config, width=24, dropout=0.0, unroll=20, batch_size=10, steps=250, every=125, lr=0.01)
    before = evaluate(task.network, task.streams, task.streams.validation)
    history = train(task, task.config, tmp_path / "run", console=QUIET)
    assert before == pytest.approx(math.log(len(task.config.vocabulary)), abs=0.1)
    assert min(loss for _, loss in history["validation"]) < 0.8
    network, loaded = load_network(tmp_path / "run")
    assert loaded == task.config and not network.training
    assert evaluate(network, task.streams, task.streams.validation) == min(loss for _, loss in history["validation"])
    samples = contents(tmp_path / "run" / "samples")
    assert set(samples) == {f"step-{step:06d}.txt" for step in (100, 125, 250)}
    assert all(len(text.decode()) == 500 for text in samples.values())
    assert len(re.findall(r"\d+ times \d+ is \d+\.\n", samples["step-000250.txt"].decode())) > 8


SETTINGS = ["--width", 6, "--batch-size", 3, "--unroll", 5, "--dropout", 0.3, "--every", 2, "--test", 0.1]


def test_train_and_sample_by_command_line(config, tmp_path: Path, monkeypatch, capsys):
    trained = tmp_path / "run"
    arguments = ["--text", config.text, "--out", trained, "--ops", "torch", *SETTINGS]
    assert run_cli(monkeypatch, "train", "char-rnn", *arguments, "--steps", 4) == 0
    printed = capsys.readouterr().out
    assert "characters/s" in printed and "step 4:" in printed and "bits per character" in printed
    wanted = {"best.safetensors", "last.safetensors", "config.json", "history.json", "metrics.json", "loss.png"}
    assert set(contents(trained)) == wanted | {"samples/step-000002.txt", "samples/step-000004.txt"}
    metrics = json.loads((trained / "metrics.json").read_text())
    assert list(metrics) == ["validation", "validation with context", "test", "test with context"]
    assert len({losses["nats per character"] for losses in metrics.values()}) == 4
    for losses in metrics.values():
        assert losses["bits per character"] == pytest.approx(losses["nats per character"] / math.log(2))

    def written(*arguments: object) -> str:
        assert run_cli(monkeypatch, "sample", "--checkpoint", trained, "--length", 40, *arguments) == 0
        return capsys.readouterr().out

    plain = written("--seed", 3, "--prime", "7 times")
    assert plain.startswith("7 times") and len(plain) == 7 + 40 + 1
    assert written("--seed", 3, "--prime", "7 times", "--stream") == plain
    assert written("--seed", 4, "--prime", "7 times") != plain
    assert len({written("--temperature", 2) for _ in range(3)}) == 3  # without a seed always a new text
    greedy = written("--temperature", 0)
    assert greedy == written("--top-k", 1) == written("--top-p", 0.0001)
    assert run_cli(monkeypatch, "sample", "--checkpoint", trained, "--prime", "ß") == 1
    assert "has never seen 'ß'" in capsys.readouterr().err


def test_epochs(tmp_path: Path, config, monkeypatch, capsys):
    arguments = [
        "--text",
        config.text,
        "--out",
        tmp_path / "run",
        "--ops",
        "torch",
        *SETTINGS,
        "--unroll",
        100,
        "--every",
        99,
    ]
    assert run_cli(monkeypatch, "train", "char-rnn", *arguments, "--epochs", 2) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["steps"] == 2 * saved["epoch"] == 2 * int(0.85 * ((len(TEXT) - 1) // 300) + 1e-6)
    assert run_cli(monkeypatch, "train", "char-rnn", *arguments, "--epochs", 2, "--steps", 7) == 1
    assert "give one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt is not a file"),
        (["--text", "short.txt"], "5 characters is too short for 50 streams"),
        (["--text", "empty.txt"], "empty.txt is empty"),
        (["--text", "binary.txt"], "binary.txt is no text in UTF-8"),
        (["--text", "short.txt", "--validation", "0"], "must be shares of the text"),
        (["--steps", "0"], "steps=0: must be at least 1"),
        (["--resume"], "holds no training run"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, data in {"short.txt": b"hello", "empty.txt": b"", "binary.txt": bytes(range(256))}.items():
        (tmp_path / name).write_bytes(data)
    assert run_cli(monkeypatch, "train", "char-rnn", *arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and "Traceback" not in captured.err
    assert set(contents(tmp_path)) == {"short.txt", "empty.txt", "binary.txt"}


def test_a_segmentation_run_is_no_language_model(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text('{"tile": 572}')
    assert run_cli(monkeypatch, "sample", "--checkpoint", tmp_path) == 1
    assert "config.json is not readable as CharRNNConfig" in capsys.readouterr().err


def test_kill_and_resume_by_command_line(tmp_path: Path):
    """Fused ops and dropout; killed at some moment after its first checkpoint."""
    (tmp_path / "text.txt").write_text(TEXT)
    settings = ["--text", tmp_path / "text.txt", *SETTINGS, "--steps", 100, "--every", 20]
    environment = without_interpreter() | {"OMP_NUM_THREADS": "1"}

    def start(name: str) -> list[str]:
        return command("train", "char-rnn", "--out", tmp_path / name, *settings)

    subprocess.run(start("whole"), check=True, env=environment)
    killed = subprocess.Popen(start("killed"), env=environment)
    while not (tmp_path / "killed" / "last.safetensors").exists():
        assert killed.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    resume = command("train", "char-rnn", "--out", tmp_path / "killed", "--resume")
    subprocess.run(resume, check=True, env=environment)
    finished = contents(tmp_path / "killed")
    partial = [name for name in finished if ".partial" in name or ".tmp" in name]
    assert {name: finished[name] for name in finished if name not in partial} == contents(tmp_path / "whole")


def test_tinyshakespeare_has_the_published_size(data_dir: Path):
    config = CharRNNConfig(text=str(data_dir / "text" / "tinyshakespeare" / "input.txt"))
    streams, config = open_text(config, epochs=50)
    assert (len(config.vocabulary), config.epoch, config.steps) == (65, 423, 21_150)
    assert len(read_text(config.text)) == 1_115_394
    assert sum(parameter.numel() for parameter in CharRNNTask(config, streams).network.parameters()) == 66_369
