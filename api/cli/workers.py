"""`workers`: brings code, environment and model to the worker hosts and checks them, without starting anything."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from api.cli.processes import find_api
from api.cli.progress import Progress
from config import Settings, load_config
from config.load import export_passthrough
from distributed.bring import bring_to_worker
from distributed.hosts import ring_hosts, worker_targets
from distributed.launch import instance_id
from distributed.model_files import ModelInfo, inspect_model, models_dir, prepare_model
from distributed.workers import WorkerModel, check_workers


def workers(root: Path) -> int:
    settings = load_config(root)
    export_passthrough(settings)
    hosts = ring_hosts(settings)
    targets = worker_targets(hosts)
    if not targets:
        print("there are no workers: name them in WORKER_HOSTS (.env), for example WORKER_HOSTS=mac2.local,mac3.local")
        return 0
    if find_api(root, instance_id(root)):
        print("the server runs, and its ranks use what would be replaced: ./launch.sh stop first", file=sys.stderr)
        return 1
    progress = Progress()
    model = worker_model(
        settings, root, inspect_model(prepare_model(settings.model_repo, root, progress=progress.show))
    )
    progress.end()
    with ThreadPoolExecutor(max_workers=len(targets)) as pool:
        list(pool.map(lambda target: bring_to_worker(settings, target, model, print), targets))
    check_workers(settings, hosts, model, print)
    print("all workers can take part: ./launch.sh start")
    return 0


def worker_model(settings: Settings, root: Path, info: ModelInfo) -> WorkerModel:
    """How the workers come to have the model that was prepared here."""
    path = info.path
    given = Path(settings.model_repo).expanduser()
    is_folder = path.is_relative_to(models_dir(root)) or path in (given, root / given, given.absolute())
    size_bytes = sum(file.total_bytes for file in info.weight_files)
    return WorkerModel(settings.model_repo, path if is_folder else None, size_bytes)
