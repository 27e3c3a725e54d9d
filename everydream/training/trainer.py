"""The loop: one page, a list of verbs. build.py makes it, update.py has an update's steps, turns.py a turn's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from everydream.training.turns import Trainer


def train(trainer: Trainer) -> int:
    """N updates and N + 1 turns: report, preview, validate, save, stop? then train. There is no second "final save".

    Returns the signal that ended the run, 0 if it ran to its end. Raises DivergedError, SaveError.
    """
    state, update = trainer.state, trainer.update
    while True:
        trainer.report()
        trainer.preview()
        trainer.validate()
        trainer.save()
        if trainer.is_over():
            return trainer.finish()

        trainer.set_learning_rates()
        update.begin(state.step)
        for batch, is_last in update.micro_batches():
            with update.gradients_stay_local(unless=is_last):
                update.backward(update.loss(batch))
        verdict = update.agree()
        if verdict.is_abandoned:  # a signal between two micro-batches: the next turn saves what was before them
            trainer.stop(verdict)
            continue
        if verdict.is_finite:
            update.apply(verdict)
        trainer.advance(verdict)
        if verdict.is_finite:
            trainer.average()
        else:
            trainer.skip(verdict)
        trainer.plugins.after_step(trainer)
