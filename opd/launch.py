"""`opd launch`: one node's part of a run, or all of it: servers, learner, and how they end."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from pathlib import Path

from opd import __version__
from opd.config.load import compared, dump_config, load_config, resolve_model, state_of_run
from opd.config.placement import node_of, placement_of
from opd.config.schema import Config
from opd.doctor import preflight
from opd.inference.host import sweep
from opd.processes.cluster import Alone, Cluster, End
from opd.processes.commands import Command, learner, servers
from opd.processes.layout import Layout, layout, told
from opd.processes.supervise import conclude, supervise
from opd.report.page import write_report
from opd.settings import UserError
from opd.storage import run_folder
from opd.storage.disk import filling
from opd.storage.json_lines import read_lines
from opd.storage.metrics import MetricsLog
from opd.storage.run_folder import split


def launch(recipe: str, overrides: list[str], dry_run: bool = False, plain: bool = False) -> int:
    """Run a recipe: checks, servers, learner. 0 when done, 128 + number when a signal stopped it (130 for Ctrl-C).

    Raises UserError for what the user can mend and RunFailed for all else that ends a server or the learner.
    """
    began = time.time()
    config = load_config(recipe, overrides)
    if dry_run:
        show(config, recipe, overrides)
        return 0
    where, node = layout(config), node_of(config)
    if state_of_run(config) == "finished":
        print(f"{config.run.dir}: this run is finished; set run.overwrite=true to do it again")
        return 0
    folder, is_head = Path(config.run.dir), node == where.head

    def parts() -> tuple[list[Command], Command | None]:
        for line in preflight.check(config):
            print(f"checked: {line}", flush=True)
        if is_head:
            (folder / "status.json").unlink(missing_ok=True)
        return servers(config, where.on(node)), learner(config, recipe, overrides, where, node)

    with run_folder.lock(folder, node), filling(folder, "run.dir"):
        cluster = _cluster(config, where, node)
        try:
            end = supervise(config, parts, cluster, plain, [p.url for p in where.servers if p.node != node])
        finally:
            cluster.close()
            sweep(config.rollout.transfer_dir)
            if is_head:
                run_folder.add_launch(folder, began)
        if end.code and is_head:
            _mark(config, end, len(where.hosts))
    if code := conclude(end, "; the same command resumes from the last checkpoint"):
        return code
    if is_head:
        print(f"wrote {config.run.dir}", flush=True)
        for path in write_report([folder], folder):
            print(f"wrote {path}", flush=True)
    return 0


def serve(recipe: str, overrides: list[str], plain: bool) -> int:
    """`opd serve`: this node's servers alone, until a signal comes; prints what a learner elsewhere has to be told.

    Raises UserError when the recipe needs none here, RunFailed when a server dies.
    """
    config = load_config(recipe, overrides)
    where, node = layout(config), node_of(config)
    started = servers(config, where.on(node))
    if not started:
        raise UserError(f"{recipe}: no server of it runs on node {node}; see opd launch --dry-run")
    given = [f"rollout.transport={config.rollout.transport}", f"teacher.kind={config.teacher.kind}"]
    given += told(where.servers)
    print(f"# for the learner, once they are healthy:\n{shlex.join(given)}\n", flush=True)
    return conclude(supervise(config, lambda: (started, None), Alone(), plain, []), "")


def _cluster(config: Config, where: Layout, node: int) -> Alone:
    if len(where.hosts) == 1:
        return Alone()
    same = [compared(dump_config(config)), where.hosts, where.placement.model_dump(), __version__]
    digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
    print(f"node {node} of {len(where.hosts)}: waiting for the others", flush=True)
    learners = where.placement.learner_nodes
    return Cluster(where.hosts, where.hub_port, node, learners, digest, config.launch.lost_after_s)


def _mark(config: Config, end: End, nodes: int) -> None:
    """The learner may have taken another process's end, or another node's, for a failure of its own."""
    folder = Path(config.run.dir)
    steps = list(read_lines(folder / "metrics.jsonl"))
    log = MetricsLog(folder, [], "", config.run.stage)
    done = steps[-1]["step"] if steps else 0
    if end.code >= 128:
        log.status("interrupted", "", done, config.train.steps)
    elif nodes > 1 and (folder / "config.yaml").is_file():
        log.status("failed", "", done, config.train.steps, end.message, end.user_error)


def show(config: Config, recipe: str, overrides: list[str]) -> None:
    """Print what a launch would start, node by node."""
    nodes = placement_of(config).nodes
    if nodes > 1 and not config.launch.hosts:
        config = config.changed({"launch.hosts": [f"node{n}" for n in range(nodes)]})
        overrides = [*overrides, f"launch.hosts=[{','.join(config.launch.hosts)}]"]
    where = layout(config)
    missing: set[str] = set()

    def expected(path: str, key: str) -> str:
        """A dry run may come before the run whose checkpoint it starts from."""
        try:
            return resolve_model(path, key)
        except UserError as e:
            if not path.startswith("runs/") and not (split(path)[0] / "config.yaml").is_file():
                raise
            if path not in missing:
                print(f"# not there yet: {e}\n")
            missing.add(path)
            return f"{split(path)[0]}/checkpoints/step_N/model"

    for node, host in enumerate(where.hosts):
        if nodes > 1:
            print(f"## node {node}, {host}\n")
        trainer = learner(config, recipe, overrides, where, node)
        for command in [*servers(config, where.on(node), expected), *([trainer] if trainer else [])]:
            print(f"# {command.name}\n{command.shell()}\n")
