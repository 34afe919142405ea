"""Configuration: validated when built, frozen, JSON-ready, the same string in and out."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tersor
from tersor import Codec, between, config, field, method, one_of, positive


@method
class Everything(Codec):
    """A method with a setting of every type."""

    name = "everything"
    domains = ("array",)
    count: int = field(4, between(2, 8))
    rate: float = field(0.5, positive)
    mode: str = field("fast", one_of("fast", "small"))
    flag: bool = field(False)
    levels: tuple[int, ...] = field((8, 5, 5), between(2, 16))
    limit: int | None = field(None)


@given(
    st.builds(
        Everything,
        count=st.integers(2, 8),
        rate=st.floats(0.001, 1e6),
        mode=st.sampled_from(["fast", "small"]),
        flag=st.booleans(),
        levels=st.lists(st.integers(2, 16), max_size=4).map(tuple),
        limit=st.none() | st.integers(-5, 5),
    )
)
def test_string_and_json_build_an_equal_method(m):
    name, settings = config.parse(str(m))
    assert name == "everything"
    assert config.build(Everything, settings, text=True) == m
    assert config.build(Everything, json.loads(json.dumps(m.settings()))) == m
    assert hash(config.build(Everything, m.settings())) == hash(m)


def test_the_string_names_only_what_differs():
    assert str(Everything()) == "everything"
    assert str(Everything(count=3, levels=(2, 2), flag=True)) == "everything:count=3,flag=true,levels=[2,2]"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"count": 9}, "everything: count=9 is not allowed; allowed: 2 to 8"),
        ({"count": 2.5}, "everything: count=2.5 is of type float; allowed: int"),
        ({"count": True}, "count=True is of type bool; allowed: int"),
        ({"rate": 0}, "rate=0.0 is not allowed; allowed: a value above 0"),
        ({"rate": float("nan")}, "allowed: float \\(finite\\)"),
        ({"mode": "slow"}, "mode='slow' is not allowed; allowed: 'fast', 'small'"),
        ({"levels": (8, 1)}, "levels=\\(8, 1\\) is not allowed; allowed: 2 to 16"),
        ({"limit": "x"}, "allowed: int or None"),
        ({"cuont": 3}, "unknown setting 'cuont' .did you mean count\\?.; allowed: count, rate"),
    ],
)
def test_a_wrong_setting_says_what_is_allowed(settings, said):
    with pytest.raises(tersor.ConfigError, match=said):
        config.build(Everything, settings)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("everything:count", "has no '='"),
        ("everything:count=2,count=3", "given twice"),
        (":count=2", "no name"),
        ("everything:count=2,,flag=1", "an empty setting"),
    ],
)
def test_a_wrong_string_says_how_it_is_written(text, said):
    with pytest.raises(tersor.ConfigError, match=said):
        config.parse(text)


def test_text_that_cannot_be_read_says_the_type():
    with pytest.raises(tersor.ConfigError, match="count=two cannot be read; allowed: int"):
        config.build(Everything, {"count": "two"}, text=True)


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        Everything().count = 3


def test_an_author_s_mistake_is_a_plugin_error():
    with pytest.raises(tersor.PluginError, match="domains=\\('pictures',\\); allowed: bytes"):

        @method
        class Wrong(Codec):
            name = "wrong"
            domains = ("pictures",)

    with pytest.raises(tersor.PluginError, match="a configuration field is int"):

        @method
        class AlsoWrong(Codec):
            name = "wrong"
            domains = ("array",)
            table: dict = field(None)
