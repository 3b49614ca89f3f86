"""gin files: values reach the settings, and what is wrong is said with what would be right."""

import pytest

from moss_jax import gin_bindings
from moss_jax.config import ConfigError, SessionConfig, TokenSampling


@pytest.fixture(autouse=True)
def nothing_bound():
    yield
    gin_bindings.parse()


def test_bindings_reach_the_settings_and_parameters_win_over_files(tmp_path):
    file = tmp_path / "a.gin"
    file.write_text("SessionConfig.tokens_per_second = 8\nSessionConfig.clock = 'realtime'\n")
    gin_bindings.parse([str(file)], ["SessionConfig.tokens_per_second = 9"])
    assert gin_bindings.settings(SessionConfig) == SessionConfig(clock="realtime", tokens_per_second=9)
    assert type(gin_bindings.settings(SessionConfig)) is SessionConfig
    assert gin_bindings.settings(TokenSampling) == TokenSampling()
    gin_bindings.parse()
    assert gin_bindings.settings(SessionConfig) == SessionConfig()


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("SessionConfg.clock = 'realtime'", "nearest valid name is SessionConfig"),
        ("SessionConfig.token_per_second = 8", "nearest valid name is tokens_per_second"),
        ("SessionConfig.clock =", "parse"),
    ],
)
def test_bad_bindings_are_refused_in_one_line(binding, message):
    with pytest.raises(ConfigError, match=message) as error:
        gin_bindings.parse([], [binding])
    assert "\n" not in str(error.value)


def test_values_that_the_settings_refuse():
    gin_bindings.parse([], ["SessionConfig.tokens_per_second = 0"])
    with pytest.raises(ConfigError, match="tokens_per_second must be at least 1, not 0"):
        gin_bindings.settings(SessionConfig)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.gin"):
        gin_bindings.parse(["nowhere.gin"])
