import pytest
import torch
from backstride.models.language.char_rnn import CharRNN
from backstride.models.language.hello import learn_hello, show_hello, spell
from backstride.models.language.sampling import probabilities, sample
from rich.console import Console

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


@pytest.fixture(scope="module")
def network() -> CharRNN:
    torch.manual_seed(0)
    network = CharRNN(4, layers=2, width=5, ops="torch").eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return network


def text(network: CharRNN, length: int = 20, seed: int = 0, **options) -> str:
    return "".join(sample(network, "abc\n", length, torch.Generator().manual_seed(seed), **options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 1e-9}, [0, 1, 0, 0]),
        ({"temperature": 1e12}, [0.25] * 4),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        # Of the two likeliest, rescaled to 4/7 and 3/7, the first alone reaches one half.
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
        ({"temperature": 0.5, "top_k": 3}, [0, 16 / 29, 4 / 29, 9 / 29]),
    ],
)
def test_probabilities(options, expected):
    assert probabilities(LOGITS, **options).tolist() == pytest.approx(expected, abs=1e-7)


def test_equal_logits_are_told_apart_by_their_order():
    assert probabilities(torch.zeros(4), top_k=2).tolist() == [0.5, 0.5, 0, 0]
    assert probabilities(torch.zeros(4), temperature=0).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        probabilities(LOGITS, **options)


def test_samples_follow_the_network(network):
    """The frequencies of a two-character text are the products of the network's conditional probabilities."""
    count = 4000
    seen = [text(network, 2, seed, prime="ab") for seed in range(count)]
    with torch.no_grad():
        logits, hidden = network(torch.tensor([[0], [1]]))
        first = logits[-1, 0].softmax(0)
        for index, character in enumerate("abc\n"):
            second = network(torch.tensor([[index]]), hidden)[0][0, 0].softmax(0)
            for follower, chance in zip("abc\n", (first[index] * second).tolist(), strict=True):
                # Within five standard deviations of a binomial count.
                assert seen.count(character + follower) == pytest.approx(
                    count * chance, abs=5 * (count * chance) ** 0.5
                )


def test_seeds(network):
    assert text(network) == text(network) != text(network, seed=1)
    assert len(text(network, 33)) == 33 and text(network, 0) == ""


def test_without_prime_it_starts_as_after_a_line_end(network):
    bare, after_line_end, after_a = (
        [text(network, 2, seed, **prime) for seed in range(30)] for prime in ({}, {"prime": "\n"}, {"prime": "a"})
    )
    assert bare == after_line_end != after_a
    greedy = sample(network, "abcd", 9, torch.Generator(), temperature=0)
    assert "".join(greedy) == "".join(sample(network, "abcd", 9, torch.Generator(), prime="a", temperature=0))


def test_greedy_sampling_takes_the_likeliest_every_time(network):
    written = text(network, 12, prime="a", temperature=0)
    with torch.no_grad():
        indices = torch.tensor(["abc\n".index(character) for character in "a" + written[:-1]])
        likeliest = network(indices[:, None])[0][:, 0].argmax(-1)
    assert written == "".join("abc\n"[index] for index in likeliest)


def test_unknown_prime(network):
    with pytest.raises(ValueError, match="has never seen 'x', 'ß' of the prime text"):
        text(network, prime="aßbx")
    with pytest.raises(ValueError, match="length=-1"):
        text(network, length=-1)


def test_hello_is_learnt():
    network, losses = learn_hello(ops="torch")
    assert sum(parameter.numel() for parameter in network.parameters()) == 33
    assert losses[0] == pytest.approx(1.386, abs=0.01) and losses[-1] < 0.01
    assert spell(network) == "ello"
    untrained, _ = learn_hello(steps=0, ops="torch")
    assert spell(untrained) != "ello"


def test_hello_with_the_kernels():
    fused, torch_ = (learn_hello(steps=12, ops=ops)[1] for ops in ("fused", "torch"))
    assert fused == pytest.approx(torch_, rel=1e-4)


def test_hello_is_shown(monkeypatch, capsys):
    monkeypatch.setattr("backstride.models.language.hello.learn_hello", lambda: learn_hello(steps=100, ops="torch"))
    show_hello(Console(width=100))
    printed = capsys.readouterr().out
    assert "33 weights" in printed and 'Sampled greedily from "h": "ello"' in printed
    # One row for each letter, with the target's probability close to one.
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() + row.split("│")[-2].strip() for row in rows] == ["he", "el", "ll", "lo"]
    for row in rows:
        chances = dict(zip("helo", map(float, row.split("│")[3:7]), strict=True))
        assert chances[row.split("│")[-2].strip()] > 0.99
