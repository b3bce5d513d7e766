"""What users ask of a running study from other processes: pause, resume, stop, enqueue.

Their commands stand in the study database.  A pause stands there until it is taken back or its trial is over,
so that it outlives the driver; everything else is done once.
"""

from __future__ import annotations

from autosft.profiles.errors import UserError
from autosft.scheduler.events import Note, TrialEnded
from autosft.scheduler.loop.results import stop
from autosft.scheduler.loop.state import Loop
from autosft.studies.trial import StopReason, TrialState
from autosft.studies.values import Command, CommandKind

#: How often the database is asked for commands.
POLL_COMMANDS_S = 1.0

ORIGIN = "enqueued"


def drop_stale(loop: Loop) -> None:
    """Forget what was asked of the whole study, before and after a run: to start it again is a later wish."""
    for command in loop.records.pending_commands():
        if command.trial is None and command.kind is not CommandKind.ENQUEUE:
            loop.records.finish_command(command.id, now=loop.runner.now())


def obey(loop: Loop, *, at_once: bool = False) -> bool:
    """Do what users have asked for since the last time; say whether there was anything new."""
    now = loop.runner.now()
    if not at_once and now - loop.commands_at < POLL_COMMANDS_S:
        return False
    loop.commands_at = now
    before = loop.num_obeyed
    pauses: dict[int | None, list[Command]] = {}
    for command in loop.records.pending_commands():
        if command.trial is not None and command.trial >= len(loop.records.trials()):
            loop.observe(Note(message=f"There is no trial {command.trial} to {command.kind.value}."))
            finish(loop, command)
            continue
        match command.kind:
            case CommandKind.PAUSE:
                pauses.setdefault(command.trial, []).append(command)
            case CommandKind.RESUME:
                resume(loop, command.trial)
                for one in (*pauses.pop(command.trial, ()), command):
                    finish(loop, one)
            case CommandKind.STOP:
                stop_what(loop, command.trial)
                finish(loop, command)
            case CommandKind.ENQUEUE:
                enqueue(loop, command)
                finish(loop, command)
    for trial, commands in pauses.items():
        if trial is None:
            pause_study(loop)
        elif not pause(loop, trial):
            for one in commands:
                finish(loop, one)
    return loop.num_obeyed > before


def finish(loop: Loop, command: Command) -> None:
    loop.records.finish_command(command.id, now=loop.runner.now())
    loop.num_obeyed += 1


def pause(loop: Loop, trial: int) -> bool:
    """Keep a trial from running, with its checkpoint; False where it is over."""
    record = loop.records.trial(trial)
    if record.state.is_over:
        loop.held.discard(trial)
        return False
    if trial not in loop.held:
        loop.held.add(trial)
        loop.observe(Note(message=f"Trial {trial} is paused by the user."))
    if trial in loop.running:
        stop(loop, loop.running[trial], StopReason.PAUSED)
    elif record.state is TrialState.WAITING:
        loop.records.set_state(trial, TrialState.PAUSED, now=loop.runner.now())
    return True


def pause_study(loop: Loop) -> None:
    """Give all devices back until the study is resumed; what runs saves a checkpoint first."""
    if not loop.is_paused:
        loop.is_paused = True
        loop.observe(Note(message=f"Paused by the user, until: autosft studies resume {loop.run.name}"))
    for running in loop.running.values():
        stop(loop, running, StopReason.SHUTDOWN)
    loop.idle.excuse()


def resume(loop: Loop, trial: int | None) -> None:
    """Take a pause back; a trial that a rung has paused is promoted."""
    if trial is None:
        if loop.is_paused:
            loop.is_paused = False
            loop.observe(Note(message="Resumed by the user."))
        return
    loop.held.discard(trial)
    if loop.records.trial(trial).state is TrialState.PAUSED:
        loop.records.set_state(trial, TrialState.WAITING, now=loop.runner.now())
        loop.first_in_line.add(trial)
        loop.observe(Note(message=f"Trial {trial} is resumed by the user."))


def stop_what(loop: Loop, trial: int | None) -> None:
    """End a trial with what it has measured, or leave the study with everything kept."""
    if trial is None:
        loop.was_stopped = True
        return
    loop.held.discard(trial)
    if trial in loop.running:
        stop(loop, loop.running[trial], StopReason.USER)
    elif not loop.records.trial(trial).state.is_over:
        words = "stopped by the user"
        loop.records.set_state(trial, TrialState.STOPPED, message=words, now=loop.runner.now())
        loop.observe(TrialEnded(record=loop.records.trial(trial)))


def enqueue(loop: Loop, command: Command) -> None:
    """Put parameters in front of what the sampler would propose."""
    words = ", ".join(f"{name} {value}" for name, value in command.parameters)
    try:
        is_new = loop.records.enqueue(dict(command.parameters), origin=ORIGIN, now=loop.runner.now())
    except UserError as error:
        loop.observe(Note(message=f"Not enqueued: {error.message}"))
        return
    done = f"Enqueued by the user: {words}." if is_new else f"Tried or enqueued before: {words}."
    num_asked = loop.records.num_finished() + len(loop.records.unfinished())
    if is_new and num_asked >= loop.run.num_trials:
        done += f" All {loop.run.num_trials} trials have begun: it comes first when more are asked for."
    loop.observe(Note(message=done))
