"""What training takes of a board's memory beside torch and the model.

The control is a process that makes the same steps with torch alone: as many matrices as the model of tests has, as
large as its smaller ones, and AdamW. What the worker takes beyond it is what we add: the protocol, the data plane,
tokenizers, reading and judging.
"""

from __future__ import annotations

import subprocess
import sys

import psutil

from benchmarks.parts.killed import BOARDS, begin, finished, job_of, running, state_of
from benchmarks.report import Figure, at_most

CONTROL = """
import psutil, torch
torch.set_num_threads(1)
weights = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(28)]
made = torch.optim.AdamW(weights, foreach=False)
for _ in range(12):
    x = torch.randn(48, 64)
    for weight in weights:
        x = torch.nn.functional.silu(x @ weight)
    made.zero_grad()
    torch.nn.functional.cross_entropy(x, torch.zeros(48, dtype=torch.long)).backward()
    made.step()
print(psutil.Process().memory_info().rss)
"""


def measure() -> list[Figure]:
    done = subprocess.run([sys.executable, "-c", CONTROL], capture_output=True, text=True, check=True)
    control = int(done.stdout)
    agents: list[int] = []
    workers: list[int] = []
    with running() as (site, model):
        found = {board.name: psutil.Process(board.pid) for board in site.boards.status().boards}
        agents += [found[board].memory_info().rss for board in BOARDS]
        name = begin(site, job_of(model, "footprint", "federated"))
        while state_of(site, name)["state"] == "running":
            for board in BOARDS:
                for child in found[board].children(recursive=True):
                    try:
                        if "agent.workers.training" in " ".join(child.cmdline()):
                            workers.append(child.memory_info().rss)
                    except psutil.NoSuchProcess:
                        continue
        finished(site, name)
    return [
        at_most("an idle agent that can train", max(agents) / 1e6, "MB", 60),
        Figure("torch alone, training as much", control / 1e6, "MB"),
        Figure("a worker while it trains", max(workers) / 1e6, "MB"),
        at_most("a worker beyond torch and the model", (max(workers) - control) / 1e6, "MB", 100),
    ]
