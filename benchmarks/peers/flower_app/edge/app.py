"""Each client adds something to the arrays and sends them back; the server prints how long rounds took."""

import itertools
import json
import time

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(msg: Message, _context: Context) -> Message:
    arrays = [array + np.float32(1e-3) for array in msg.content["arrays"].to_numpy_ndarrays()]
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=msg)


@server.main()
def main(grid: Grid, context: Context) -> None:
    wanted = context.run_config
    began_s = []

    class Timed(FedAvg):
        def configure_train(self, *arguments, **named):
            began_s.append(time.monotonic())
            return super().configure_train(*arguments, **named)

    count = int(wanted["clients"])
    strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
    start = ArrayRecord([np.zeros(int(wanted["elements"]), np.float32)])
    strategy.start(grid=grid, initial_arrays=start, num_rounds=int(wanted["rounds"]))
    began_s.append(time.monotonic())
    took_s = [later - earlier for earlier, later in itertools.pairwise(began_s)]
    print("rounds_s " + json.dumps(took_s), flush=True)
