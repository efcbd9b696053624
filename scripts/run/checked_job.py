"""A configuration to a job: everything about it that can be checked without weights."""

from scripts.run.config import Config
from scripts.run.hub_models import read_model_info
from scripts.run.inputs import read_inputs
from scripts.run.loras import find_loras, with_loras
from scripts.run.machine_checks import check_backends
from scripts.run.option_checks import check_combinations
from scripts.run.parallel import plan_degrees
from scripts.run.plan import solved_config
from scripts.run.sampler import Job
from scripts.run.shortage import check_mask, check_memory
from scripts.run.validate import check_sizes, check_values, resolve_device, resolve_model


def open_job(config: Config, device: str, path: str, dry_run: bool = False) -> tuple[Job, list[str]]:
    """The job of a configuration whose values are checked, and remarks on what does not combine well.

    `dry_run` fetches nothing and lowers what this machine lacks to a remark. Raises UsageError for sizes,
    inputs, combinations and LoRAs that do not fit the model.
    """
    model = read_model_info(path)
    check_sizes(config, model)
    inputs = read_inputs(config, dry_run)
    remarks = check_combinations(config, device, 1 + ("transformer_2" in model.parameters), dry_run)
    loras = find_loras(config, path, fetch=not dry_run)
    return Job(config, with_loras(model, loras), path, device, loras, inputs), remarks


def checked_job(config: Config) -> Job:
    """A job of one process that can run here; UsageError where it cannot."""
    check_values(config)
    job, _ = open_job(config, resolve_device(config), resolve_model(config))
    plan_degrees(config, job.model, 1, 1)
    check_mask(config, job.model)
    solved_config(config, job.model)
    check_memory(config, job.model, job.device)
    check_backends(config, job.model, job.device)
    return job
