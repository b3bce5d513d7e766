"""What the tables say after any commit, the last one of a driver that was killed included.

A transition that is made in two transactions is found out here, at its first half.
"""

from __future__ import annotations

import sqlite3

#: What must be, and a query for what breaks it.
RULES = {
    "a trial has as many attempts as it says": """
        SELECT number FROM autosft_trials t
        WHERE num_attempts <> (SELECT count(*) FROM autosft_attempts WHERE trial_id = t.id)""",
    "a trial runs while one attempt is open": """
        SELECT number FROM autosft_trials t
        WHERE (state = 'running') <>
            (SELECT count(*) FROM autosft_attempts WHERE trial_id = t.id AND ended_at IS NULL)""",
    "an attempt that is over says how it ended": """
        SELECT id FROM autosft_attempts WHERE (ended_at IS NULL) <> (outcome IS NULL)""",
    "a trial that is over says when it ended": """
        SELECT number FROM autosft_trials
        WHERE (finished_at IS NULL) <> (state IN ('waiting', 'running', 'paused'))""",
    "a trial with an evaluation has a value": """
        SELECT t.number FROM autosft_trials t
        JOIN autosft_attempts a ON a.trial_id = t.id JOIN autosft_measurements m ON m.attempt_id = a.id
        WHERE t.value IS NULL AND m.evaluation > 0""",
    "what a running trial would go on from is known": """
        SELECT path FROM
            (SELECT m.checkpoint AS path, max(m.id)
             FROM autosft_measurements m JOIN autosft_attempts a ON m.attempt_id = a.id
             WHERE a.ended_at IS NULL AND m.checkpoint IS NOT NULL GROUP BY a.id)
        WHERE path NOT IN (SELECT path FROM autosft_checkpoints)""",
    "what was enqueued is a trial once it is taken from the queue, and not before": """
        SELECT number FROM autosft_trials t
        WHERE (origin <> 'sampler') <>
            (SELECT count(*) FROM autosft_queue q WHERE q.study_id = t.study_id AND q.trial = t.number)""",
    "a study has one driver that has not ended": """
        SELECT id FROM autosft_drivers d
        WHERE (ended_at IS NULL) <> (SELECT count(*) FROM autosft_studies WHERE driver_id = d.id)""",
}
_ALL = " UNION ALL ".join(f"SELECT '{words}', * FROM ({query})" for words, query in RULES.items())


def assert_whole(connection: sqlite3.Connection) -> None:
    """Assert that what this connection sees is what a next driver can go on from."""
    broken = connection.execute(_ALL).fetchall()
    assert not broken, "; ".join(f"{words}, but not {what}" for words, what in broken)
