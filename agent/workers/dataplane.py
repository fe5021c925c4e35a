"""The connection over which a worker sends and receives frames."""

from __future__ import annotations

from agent.workers.pipe import BrokerLogin
from wire.limits import DATA_KEEPALIVE_S
from wire.mqtt import MqttTransport


def data_connection(login: BrokerLogin) -> MqttTransport:
    """A transport that is not started yet. It begins with MQTT 3.1.1: frames need nothing of MQTT 5."""
    return MqttTransport(
        login.url,
        login.client_id,
        keepalive_s=DATA_KEEPALIVE_S,
        username=login.username,
        password=login.password,
        five=False,
    )
