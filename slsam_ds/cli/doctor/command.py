"""The command: packages first, by their names alone, then the machine, then the run that the flags describe."""

import sys
from collections.abc import Sequence

from slsam_ds.cli.doctor.finding import Finding, any_problem, as_text
from slsam_ds.cli.doctor.packages import import_findings, package_findings, read_packages

_DESCRIPTION = """Check whether this machine can train with SL-SAM: package versions, accelerators, the communication
backend, DeepSpeed's operators and the tools that build them, abandoned locks, threads. With --deepspeed and --model,
also check whether that configuration and that model will work, what a step costs, and whether it fits into memory.
Each finding is one line: ok, note (it works, but there is something to know) or problem (it will not work), and what
to do about it. Nothing is built. MODEL is a model of the transformers library; if it is a hub id, its config.json is
downloaded, and nothing else."""

_EPILOG = """
examples:
  slsam doctor
  slsam doctor --deepspeed zero2 --model path/to/model
  slsam doctor --deepspeed my.json --model config.json --world_size 8 --sequence_length 4096 --slsam preset=adamw_price

exit codes: 0 if there is no problem, 1 if there is one, 2 if a flag cannot be used
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit code: 1 where there is a problem; 2 where a flag cannot be used, after one sentence on stderr.
    """
    argv = sys.argv[1:] if argv is None else argv
    findings = package_findings(read_packages())
    asks_for_help = "-h" in argv or "--help" in argv
    if not any_problem(findings) and not asks_for_help:
        findings += import_findings()
    if not any_problem(findings):
        # Here, because all that follows needs those packages.
        from slsam_ds.cli.refusal import EXIT_CODE, UsageError

        try:
            findings += _look(argv)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_CODE
    print(as_text(findings))
    return int(any_problem(findings))


def _look(argv: Sequence[str]) -> list[Finding]:
    """The machine and the run.

    Raises:
        UsageError: A flag that cannot be used.
    """
    from slsam_ds.cli.estimate_arguments import RunArguments, parse_run

    given = parse_run(
        argv,
        RunArguments,
        prog="slsam doctor",
        usage="slsam doctor [--deepspeed JSON | --zero STAGE | --fsdp] [--model MODEL] [flags]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    from slsam_ds.cli.command_line import quieten
    from slsam_ds.cli.doctor.examination import check_files, run_findings
    from slsam_ds.cli.doctor.machine import look_around, machine_findings

    quieten()
    check_files(given)
    machine = look_around()
    return [*machine_findings(machine), *run_findings(given, machine)]
