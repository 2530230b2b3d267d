"""The part of the service that starts evaluations and reports their results.

consumes   completed broadcasts, and completed evaluations (buffer/evaluations.py)
waits for  nothing
answers    the learner with EvaluationBegan, EvaluationEnded and TargetReached
"""

from speed_async.buffer.components import Components
from speed_async.buffer.evaluations import Accuracy
from speed_async.buffer.handlers.effects import Effects, began_messages, ended_messages
from speed_async.buffer.reporting.status import evaluation_values
from speed_async.buffer.state import ServiceState
from speed_async.config.sections.evaluate import HELD_OUT
from speed_async.observability.metrics import EventKind
from speed_async.transport import messages as m


class EvaluationHandler:
    def __init__(self, components: Components, state: ServiceState) -> None:
        self._evaluations = components.evaluations
        self._statistics = components.statistics
        self._diagnoses = components.diagnoses
        self._target_accuracy = components.config.run.stop_at_accuracy
        self._state = state

    def published(self, message: m.WeightsPublished) -> list[m.Message]:
        """Start the evaluations that are due. Returns the messages to the learner."""
        if message.error:
            return []
        return began_messages(self._evaluations.start_due(message.policy_version))

    def completed(self, result: Accuracy) -> Effects:
        """Report a complete evaluation. Diagnoses, and the accuracy that ends a run, are those of
        the held-out prompts."""
        to_learner = ended_messages([result])
        is_held_out = result.suite == HELD_OUT
        if is_held_out:
            self._statistics.evaluated(result.accuracy, result.sampled_version)
            self._diagnoses.evaluated(
                result.accuracy, result.num_completions, result.sampled_version
            )
            to_learner += self._target_reached(result)
        num_samples = self._evaluations.of(result.suite).num_samples
        values = evaluation_values(result, num_samples)
        kind: EventKind = "evaluation" if is_held_out else "suite"
        return Effects(to_learner=to_learner, events=[(kind, values)])

    def _target_reached(self, result: Accuracy) -> list[m.Message]:
        target = self._target_accuracy
        if target is None or result.accuracy < target or self._state.target_reached:
            return []
        self._state.target_reached = True
        return [m.TargetReached(accuracy=result.accuracy, policy_version=result.sampled_version)]
