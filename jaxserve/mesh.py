"""The device mesh: one axis, "tp", over which heads, feed-forward columns and the vocabulary are split."""

import os
from contextlib import contextmanager

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(tp, devices=None):
    """A mesh of the first `tp` devices.  ValueError when the machine has fewer."""
    devices = _devices() if devices is None else devices
    if tp > len(devices):
        raise ValueError(
            f"tp={tp} needs {tp} devices, and this machine shows {len(devices)} ({devices[0].device_kind})"
        )
    return Mesh(devices[:tp], ("tp",), axis_types=(AxisType.Auto,))


def _devices():
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where the plugin of a platform is not installed
        platforms = os.environ.get("JAX_PLATFORMS", "")
        asked = f" among JAX_PLATFORMS={platforms}" if platforms else ""
        raise ValueError(f"JAX finds no device{asked}: {error or 'its plugin is not installed'}") from error


def sharding(mesh, *axes):
    """Where an array lies: one entry a dimension, "tp" or None; trailing dimensions are whole everywhere."""
    return NamedSharding(mesh, PartitionSpec(*axes))


@contextmanager
def on(mesh):
    """Inside, `shard_map` splits over this mesh."""
    with jax.set_mesh(mesh):
        yield
