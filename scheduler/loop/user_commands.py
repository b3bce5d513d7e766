"""User commands for a running study, from other processes: pause, resume, stop, enqueue.  Writes `Loop.user`.

Commands are rows of the study database.  A pause stays there until it is undone or its trial is over, so that
it outlives the driver; every other command is carried out once.
"""

from __future__ import annotations

from autosft.profiles.errors import UserError
from autosft.scheduler.events import Note, TrialEnded
from autosft.scheduler.loop.attempts import request_stop
from autosft.scheduler.loop.state import Loop
from autosft.scheduler.study_run import ENQUEUED_ORIGIN
from autosft.studies.trial import StopReason, TrialState
from autosft.studies.values import Command, CommandKind

#: How often the database is polled for commands, in seconds.
POLL_INTERVAL_S = 1.0


def discard_study_commands(loop: Loop) -> None:
    """Discard pauses, resumes and stops of the entire study, before and after a run.

    A user who starts the study again overrides earlier commands.
    """
    for command in loop.records.pending_commands():
        if command.trial is None and command.kind is not CommandKind.ENQUEUE:
            loop.records.finish_command(command.id, now=loop.runner.now())


def process_commands(loop: Loop, *, at_once: bool = False) -> bool:
    """Carry out the commands sent since the last time; return whether there were any.

    Does nothing before POLL_INTERVAL_S have passed, unless `at_once`.
    """
    now = loop.runner.now()
    if not at_once and now - loop.user.polled_at < POLL_INTERVAL_S:
        return False
    loop.user.polled_at = now
    num_before = loop.user.num_done
    pauses: dict[int | None, list[Command]] = {}  # those that were not undone
    for command in loop.records.pending_commands():
        if command.trial is not None and command.trial >= len(loop.records.trials()):
            loop.observe(Note(message=f"There is no trial {command.trial} to {command.kind.value}."))
            mark_done(loop, command)
            continue
        match command.kind:
            case CommandKind.PAUSE:
                pauses.setdefault(command.trial, []).append(command)
            case CommandKind.RESUME:
                resume(loop, command.trial)
                mark_done(loop, *pauses.pop(command.trial, ()), command)
            case CommandKind.STOP:
                stop(loop, command.trial)
                mark_done(loop, command)
            case CommandKind.ENQUEUE:
                enqueue(loop, command)
                mark_done(loop, command)
    for trial, commands in pauses.items():
        if trial is None:
            pause_study(loop)
        elif not pause_trial(loop, trial):
            mark_done(loop, *commands)
    return loop.user.num_done > num_before


def mark_done(loop: Loop, *commands: Command) -> None:
    for command in commands:
        loop.records.finish_command(command.id, now=loop.runner.now())
        loop.user.num_done += 1


def mark_started(loop: Loop, trial: int) -> None:
    """Record that a trial has started: a user's resume has taken effect."""
    loop.user.prioritized_trials.discard(trial)


def pause_trial(loop: Loop, trial: int) -> bool:
    """Keep a trial from running, with its checkpoint; return False if it is over."""
    record = loop.records.trial(trial)
    if record.state.is_over:
        loop.user.paused_trials.discard(trial)
        return False
    if trial not in loop.user.paused_trials:
        loop.user.paused_trials.add(trial)
        loop.observe(Note(message=f"Trial {trial} was paused by the user."))
    if trial in loop.attempts.running:
        request_stop(loop, loop.attempts.running[trial], StopReason.PAUSED)
    elif record.state is TrialState.WAITING:
        loop.records.set_state(trial, TrialState.PAUSED, now=loop.runner.now())
    return True


def pause_study(loop: Loop) -> None:
    """Free all devices until the study is resumed; running trials save a checkpoint first."""
    if not loop.user.is_paused:
        loop.user.is_paused = True
        message = f"The study was paused by the user. To resume it: autosft studies resume {loop.run.name}"
        loop.observe(Note(message=message))
    for attempt in loop.attempts.running.values():
        request_stop(loop, attempt, StopReason.SHUTDOWN)
    loop.idle.exclude()


def resume(loop: Loop, trial: int | None) -> None:
    """Undo the pause of a trial, or (None) of the study; a trial that a rung has paused is promoted."""
    if trial is None:
        if loop.user.is_paused:
            loop.user.is_paused = False
            loop.observe(Note(message="The study was resumed by the user."))
        return
    loop.user.paused_trials.discard(trial)
    if loop.records.trial(trial).state is TrialState.PAUSED:
        loop.records.set_state(trial, TrialState.WAITING, now=loop.runner.now())
        loop.user.prioritized_trials.add(trial)
        loop.observe(Note(message=f"Trial {trial} was resumed by the user."))


def stop(loop: Loop, trial: int | None) -> None:
    """End a trial, keeping its results, or (None) the run of the study, keeping everything."""
    if trial is None:
        loop.user.is_stopped = True
        return
    loop.user.paused_trials.discard(trial)
    if trial in loop.attempts.running:
        request_stop(loop, loop.attempts.running[trial], StopReason.USER)
    elif not loop.records.trial(trial).state.is_over:
        message = "stopped by the user"
        loop.records.set_state(trial, TrialState.STOPPED, message=message, now=loop.runner.now())
        loop.observe(TrialEnded(record=loop.records.trial(trial)))


def enqueue(loop: Loop, command: Command) -> None:
    """Queue parameters ahead of the sampler's proposals."""
    parameters = ", ".join(f"{name} {value}" for name, value in command.parameters)
    try:
        is_new = loop.records.enqueue(dict(command.parameters), origin=ENQUEUED_ORIGIN, now=loop.runner.now())
    except UserError as error:
        loop.observe(Note(message=f"Not enqueued: {error.message}"))
        return
    done = "Enqueued by the user" if is_new else "Already tried or enqueued"
    message = f"{done}: {parameters}."
    num_asked = loop.records.num_finished() + len(loop.records.unfinished())
    if is_new and num_asked >= loop.run.num_trials:
        message += f" All {loop.run.num_trials} trials have begun: it runs first once more are asked for."
    loop.observe(Note(message=message))
