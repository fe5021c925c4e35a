"""The device in a few words, for the info topic and mDNS, out of a survey."""

from __future__ import annotations

import importlib.util
import platform

from agent.config import AgentConfig
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.survey import Survey
from wire.messages import DeviceInfo, EngineInfo
from wire.version import VERSION


def device_info(survey: Survey, config: AgentConfig, boot: str) -> DeviceInfo:
    """What the agent says of its device. Its addresses are those it was given to use, else all of the host."""
    memory = survey.memory
    known = [address for interface in survey.identity.interfaces for address in interface.addresses]
    addresses = config.interfaces or known
    return DeviceInfo(
        device=config.name,
        boot=boot,
        software=VERSION,
        board=text_of(survey.identity.board),
        arch=survey.identity.arch,
        os=text_of(survey.identity.os),
        python=platform.python_version(),
        cores=max(0.01, survey.cores.usable),
        cores_because=survey.cores.because,
        memory_bytes=memory.usable_bytes,
        memory_because=_memory_because(survey),
        engines=tuple(_engine(name, found) for name, found in sorted(survey.engines.items()))[:16],
        addresses=tuple(addresses[:16]),
        cache_bytes=config.cache_limit_bytes,
        emulated=config.emulation,
        data=tuple(name for name, _ in config.data),
        knows_features=True,
        knows_privacy=True,
        knows_private_split=True,
        knows_split=True,
        knows_looped=True,
        knows_own=True,
        knows_modalities=True,
        knows_secure=importlib.util.find_spec("cryptography") is not None,
        private_data=tuple(name for name, _ in config.data_epsilon),
        told_states=config.data_states,
    )


def text_of(reading: Reading[str] | Absent | Failed) -> str:
    """The value, or in brackets why there is none."""
    return reading.value if isinstance(reading, Reading) else f"({reading.because})"


def _engine(name: str, found: Reading[str] | Absent | Failed) -> EngineInfo:
    if isinstance(found, Reading):
        return EngineInfo(name=name, version=found.value, because=found.source)
    return EngineInfo(name=name, because=found.because)


def _memory_because(survey: Survey) -> str:
    """Which of total, available and limit is the least."""
    memory = survey.memory
    named = (("limit", memory.limit_bytes), ("available", memory.available_bytes), ("total", memory.total_bytes))
    for what, reading in named:
        if isinstance(reading, Reading) and reading.value == memory.usable_bytes:
            return f"{what}: {reading.source}"
    return "nothing could be read"
