import dataclasses

import pytest

import heterostep as hs


@pytest.mark.parametrize("compute", [0, 0.0, -1, 1.5, 1.0000001, float("nan"), float("inf"), "half", None, True, [0.5]])
def test_compute_out_of_range_is_refused(compute):
    with pytest.raises(hs.ConfigError, match="compute must be a finite number above 0 and at most 1"):
        hs.HSAConfig(compute=compute)


@pytest.mark.parametrize("compute", [1, 1.0, 0.5, 1e-3])
def test_compute_in_range_is_a_float(compute):
    assert hs.HSAConfig(compute=compute).compute == compute
    assert isinstance(hs.HSAConfig(compute=compute).compute, float)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("policy", "best"),
        ("policy", None),
        ("solver", "heun"),
        ("forecast", "linear"),
        ("kv_dtype", "float8"),
        ("kv_dtype", 16),
        ("warmup", 0),
        ("warmup", 2.5),
        ("warmup", True),
        ("cooldown", -1),
        ("cooldown", "1"),
        ("max_age", 0),
        ("profile", float("nan")),
        ("profile", 9.0),
        ("profile", "early"),
        ("kv_forecast", -0.1),
        ("kv_forecast", 1.1),
        ("kv_forecast", "damped"),
    ],
)
def test_every_wrong_field_is_named(field, value):
    with pytest.raises(hs.ConfigError, match=f"^{field} must be .*not "):
        hs.HSAConfig(**{field: value})


def test_config_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        hs.HSAConfig().compute = 1.0
    with pytest.raises(TypeError):
        hs.HSAConfig(0.5)


def test_error_tree():
    assert issubclass(hs.ConfigError, hs.HeterostepError)
    assert issubclass(hs.ConfigError, ValueError)
    assert issubclass(hs.RequestError, hs.HeterostepError)
    assert issubclass(hs.RequestError, ValueError)
    assert issubclass(hs.RankFailure, hs.HeterostepError)
    assert issubclass(hs.RankFailure, RuntimeError)


def test_public_names():
    with pytest.raises(AttributeError, match="no attribute"):
        _ = hs.nothing
    assert set(hs.__all__) <= set(dir(hs))
    assert hs.__version__ == "0.1.0"
