"""What memory the machines of a cluster file have, and what of it models take. Knows sizes; not what is started."""

from collections.abc import Sequence
from dataclasses import replace

from ..schema.errors import Refused
from ..schema.plan.model import Load
from ..schema.plan.sizes import size_text
from ..schema.plan.slots import Slot, devices_of, read_speeds
from .file import Model, Path_, Source


class Memory:
    """Memory that no model has taken yet, of each device of which the file says how much it has.

    Raises:
        Refused: the memory or the speed of a machine is none; the message names the line.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._slots = {name: self._read(name) for name in source.file.machines}
        known = (slot for slots in self._slots.values() for slot in slots if slot.memory)
        self._left = {(slot.name, slot.device): slot.memory for slot in known}

    def rank(self, model: Model) -> int:
        """Which models take memory first: layers by hand, those that are split here, those that the broker splits."""
        return 0 if model.stages else 1 if all(slot.memory for slot in self.slots(model)) else 2

    def slots(self, model: Model) -> list[Slot]:
        """The devices that share a model, with all their memory; 0 where the file says none."""
        return [slot for machine in model.machines or self._slots for slot in self._slots[machine]]

    def left_of(self, slots: Sequence[Slot]) -> list[Slot]:
        """Devices with what is left of their memory."""
        return [replace(slot, memory=self._left[slot.name, slot.device]) for slot in slots]

    def take(self, slot: Slot, size: int) -> None:
        self._left[slot.name, slot.device] -= size

    def part(self, slot: Slot) -> int:
        """Bytes for one of the models that the broker splits: what the others leave is for all of these alike."""
        models = [model for model in self._source.file.models.values() if self.rank(model) == 2]
        sharing = sum(slot in self.slots(model) for model in models)
        return max(1, self._left[slot.name, slot.device] // sharing)

    def book(self, machine: str, options: dict[str, str], load: Load, span: tuple[int, int], place: Path_) -> None:
        """Takes memory for layers by hand, and sets `kv_mib` among the options of their stage where it is not given.

        Raises:
            Refused: more than is left.
        """
        processes = int(options["tp"]) if options.get("tp", "").isdecimal() else 1
        options.setdefault("kv_mib", str(load.kv_mib(*span, max(1, processes))))
        device = machine, options.get("device", "cpu")
        if processes > 1 or device not in self._left or not options["kv_mib"].isdecimal():
            return
        need = load.weights(*span) + (int(options["kv_mib"]) << 20)
        if need > self._left[device]:
            left = size_text(self._left[device])
            what = f"layers {span[0]}:{span[1]} with their cache take {size_text(need)}, {left} are left on {machine}"
            raise self._source.fault(place, f"{what}: give fewer layers, or more memory")
        self._left[device] -= need

    def _read(self, machine: str) -> list[Slot]:
        entry = self._source.file.machines[machine]
        try:
            speeds = read_speeds(str(entry.speed)) if entry.speed else ()
            if entry.memory:
                return devices_of(machine, entry.memory, speeds)
            if len(speeds) > 1:
                what = f"{len(speeds)} speeds and no memory: name the devices in memory, as cuda:0:12GiB+cpu:24GiB"
                raise Refused(what)
            return [Slot(machine, 0, sum(speeds))]
        except Refused as error:
            raise self._source.fault(("machines", machine), error.message) from None
