"""Any interleaving of submissions, commands, ends and kills of the server leaves the queue exact."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.service.store.queue_store import QueueStore, open_queue
from autosft.service.values import Demand, ItemState, Submission
from tests.service.examples import demand, device, submission, way
from tests.service.fake_drivers import CLAIM_S, STOP_S, Script, World
from tests.service.lives import Lives

S = ItemState
NUM_DEVICES = 3


def drawn_demand(rng: random.Random, seconds: float) -> Demand:
    predicted_s = seconds * rng.uniform(0.7, 1.4)
    if rng.random() < 0.4:
        return demand(way(1, rng.uniform(5, 60), predicted_s, load=0.3, may_share=True))
    if rng.random() < 0.3:
        return demand(way(2, rng.uniform(5, 60), predicted_s))
    return demand(way(1, rng.uniform(5, 60), predicted_s), way(2, 20, predicted_s / 2))


class Play:
    """One interleaving."""

    def __init__(self, url: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.scripts: dict[int, Script] = {}
        self.users = open_queue(url)  # of the clients and the drivers
        self.world = World(
            self.users, self.scripts.__getitem__, devices=tuple(map(device, range(NUM_DEVICES)))
        )
        self.lives = Lives(url=url, world=self.world)
        self.keys: dict[str, tuple[Submission, int]] = {}
        self.asked: dict[int, set[str]] = {}

    def run(self, num_steps: int = 120) -> None:
        for step in range(num_steps):
            if self.rng.random() < 0.25:
                self.lives.mortality.left = self.rng.randrange(14)
            if step < num_steps // 2:
                self.ask()
            self.lives.tick()
            self.lives.check()
            self.lives.pass_time(self.rng)
        self.lives.mortality.left = None
        for item in self.users.items({S.HELD}):
            self.asked[item.id].add("released")
            self.users.release(item.id, now=self.world.now)
        self.finish()

    def finish(self) -> None:
        for _ in range(2000):
            self.lives.tick()
            self.lives.pass_time(self.rng)
            if all(item.is_ended or item.state is S.HELD for item in self.users.items()):
                return
        raise AssertionError([item for item in self.users.items() if not item.is_ended])

    def ask(self) -> None:
        """Do what a client may do, at random; some submit again what they have submitted."""
        dice = self.rng.random()
        known = [item.id for item in self.users.items()]
        if dice < 0.35 or not known:
            self.submit()
        elif dice < 0.45:
            key, (given, item_id) = self.rng.choice(sorted(self.keys.items()))
            again, is_new = self.users.submit(given, key=key, now=self.world.now)
            assert (again.id, is_new) == (item_id, False)
        elif dice < 0.65:
            item_id = self.rng.choice(known)
            name = self.rng.choice(["hold", "release", "cancel"])
            try:
                getattr(self.users, name)(item_id, now=self.world.now)
                self.asked[item_id].add(name)
            except UserError:
                return
        elif dice < 0.75:
            try:
                self.users.set_priority(self.rng.choice(known), self.rng.randint(-1, 2), now=self.world.now)
            except UserError:
                return

    def submit(self) -> None:
        seconds = self.rng.choice([20.0, 200.0, 2000.0])
        deaths = tuple(sorted(self.rng.uniform(1, seconds) for _ in range(self.rng.choice([0, 0, 0, 1, 2]))))
        script = Script(seconds=seconds, exit_code=self.rng.choice([0, 0, 0, 0, 1]), dies_at=deaths)
        given = submission(
            f"study-{len(self.keys)}",
            self.rng.choice(["ann", "bob"]),
            demand=drawn_demand(self.rng, seconds),
            priority=self.rng.choice([0, 0, 0, 1]),
            after=tuple(self.rng.sample(list(self.scripts), 1))
            if self.scripts and self.rng.random() < 0.1
            else (),
        )
        key = f"key-{len(self.keys)}"
        self.scripts[len(self.keys) + 1] = script
        item, is_new = self.users.submit(given, key=key, now=self.world.now)
        assert (item.id, is_new) == (len(self.keys) + 1, True)
        self.keys[key] = given, item.id
        self.asked[item.id] = set()

    def check_ends(self) -> None:
        items = {item.id: item for item in self.users.items()}
        assert sorted(items) == sorted(self.scripts)  # none lost, none twice
        for item_id, item in items.items():
            script, worked_s = self.scripts[item_id], self.world.worked_s.get(item_id, 0.0)
            match item.state:
                case S.DONE:
                    assert script.exit_code == 0
                    assert worked_s >= script.seconds - 1.0
                case S.FAILED:
                    assert script.exit_code == 1
                    assert worked_s >= script.seconds - 1.0
                case S.CANCELLED:
                    assert "cancel" in self.asked[item_id]
                case S.HELD:
                    before = [items[other].state for other in item.after]
                    assert any(state is not S.DONE for state in before)
                case _:
                    raise AssertionError(item)
            # Work is not done again beyond what stops and kills cost: it goes on from its checkpoints.
            assert worked_s <= script.seconds + STOP_S * item.num_starts + 2.0 * item.num_starts
            assert item.num_starts >= len([run for run in self.world.ran if run[0] == item_id])
            self.check_charge(item_id)
        assert not [one for one in self.world.processes.values() if not one.is_gone], "an orphan"
        assert len({launch for _, launch, _ in self.world.ran}) == len(self.world.ran)

    def check_charge(self, item_id: int) -> None:
        """Nobody pays for more than ran, and next to all of that is paid for."""
        item = self.users.get(item_id)
        worked_s = self.world.worked_s.get(item_id, 0.0)
        widest = max((way.width for way in (item.demand.ways if item.demand else ())), default=1)
        assert item.device_s <= worked_s * widest + 1e-6
        if item.state is S.DONE and not self.scripts[item_id].dies_at:
            narrowest = 0.05  # a shared device is charged by its share
            assert item.device_s >= worked_s * narrowest - CLAIM_S


def play(url: str, seed: int) -> Play:
    made = Play(url, seed)
    made.run()
    made.check_ends()
    return made


@pytest.fixture
def url(tmp_path: Path, empty_sqlite: Path) -> str:
    shutil.copy(empty_sqlite, tmp_path / "studies.db")
    return f"sqlite:///{tmp_path / 'studies.db'}"


@pytest.mark.parametrize("seed", range(8))
def test_an_interleaving_leaves_the_queue_exact(url: str, seed: int) -> None:
    made = play(url, seed)
    assert made.lives.num_killed >= 5
    made.users.close()
    made.lives.queue.close()


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(100, 400))
def test_many_interleavings_leave_the_queue_exact(url: str, seed: int) -> None:
    made = play(url, seed)
    made.users.close()
    made.lives.queue.close()


def one_item(url: str) -> tuple[Lives, QueueStore, dict[int, Script]]:
    scripts = {1: Script(seconds=500.0), 2: Script(seconds=20.0)}
    users = open_queue(url)
    world = World(users, scripts.__getitem__, devices=(device(0),))
    return Lives(url=url, world=world), users, scripts


def drive(lives: Lives, users: QueueStore) -> None:
    """Run one item, preempt it by another, let it go on: starts, stops and ends."""
    users.submit(submission("low", demand=demand(way(seconds=900.0))), now=lives.world.now)
    for tick in range(400):
        lives.tick()
        lives.world.advance(5.0)
        lives.check()
        if tick == 12:
            given = submission("high", priority=1, demand=demand(way(seconds=20.0)))
            users.submit(given, key="high", now=lives.world.now)
        if len(users.items()) == 2 and all(item.is_ended for item in users.items()):
            return
    raise AssertionError(users.items())


@pytest.mark.slow
def test_a_kill_at_each_step_changes_nothing(tmp_path: Path, empty_sqlite: Path) -> None:
    """Each commit, and each thing that is asked of a driver, once before and once after it."""

    def fresh(name: str) -> str:
        shutil.copy(empty_sqlite, tmp_path / name)
        return f"sqlite:///{tmp_path / name}"

    lives, users, _ = one_item(fresh("whole.db"))
    drive(lives, users)
    num_steps = lives.mortality.num_steps
    assert num_steps > 60
    reached: set[int] = set()
    for step in range(0, num_steps, max(1, num_steps // 100)):
        lives, users, _ = one_item(fresh(f"{step}.db"))
        lives.mortality.left = step
        drive(lives, users)
        low, high = users.items()
        assert (low.state, high.state) == (S.DONE, S.DONE), step
        assert lives.world.worked_s[1] <= 500.0 + 2 * STOP_S + 2.0
        assert not [one for one in lives.world.processes.values() if not one.is_gone]
        reached.add(lives.num_killed)
        users.close()
        lives.queue.close()
    assert reached == {1}
