"""What can happen to the processes and links of a run. Knows no peer's role."""

from simulation.network import Network, Node


class World(Network):
    """A network whose processes and links fail."""

    def cut(self, node: Node) -> None:
        """The connection is lost; libzmq makes another by itself, with another routing id."""
        port = self.ports[node]
        self._break(port)
        self.after(self.rng.uniform(0.01, 1.0), lambda: self._connect(port))
        self.log(f"cut {node.name}")

    def kill(self, node: Node) -> None:
        """The process dies."""
        port = self.ports.pop(node)
        port.dead = True
        self._break(port)
        node.end()
        self.log(f"kill {node.name}")

    def stop(self, node: Node, seconds: float) -> None:
        """SIGSTOP, SIGCONT later; heartbeats may find it dead meanwhile."""
        port = self.ports[node]
        if port.stopped:
            return
        port.stopped = True
        self.after(seconds, lambda: self._resume(port))
        if self.rng.random() < 0.5:
            self.after(0.6, lambda: self._heartbeat(port))
        self.log(f"stop {node.name} for {seconds:.2f} s")

    def slow(self, node: Node, seconds: float) -> None:
        """Everything to and from the node is late for a while."""
        port = self.ports[node]
        if port.conn is not None:
            port.conn.up_at = max(port.conn.up_at, self.now + seconds)
            port.conn.down_at = max(port.conn.down_at, self.now + seconds)
            self.log(f"delay {node.name} by {seconds:.2f} s")

    def hold(self, node: Node, seconds: float) -> None:
        """The link takes bytes and brings none; heartbeats end the connection where that lasts."""
        port = self.ports[node]
        conn = port.conn
        self.slow(node, seconds)
        if conn is not None and seconds > 0.6:

            def missed() -> None:
                if port.conn is conn and not port.dead:
                    conn.up_until = conn.down_until = self.now
                    self.cut(node)

            self.after(0.6, missed)

    def double(self, node: Node, seconds: float) -> None:
        """A model peer's messages come twice for a while, both ways."""
        if not self.duplicate and not node.real:
            self.duplicate = 0.5
            self.doubles = True
            self.after(seconds, lambda: setattr(self, "duplicate", 0.0))
            self.log(f"double for {seconds:.2f} s")

    def refuse(self, node: Node) -> None:
        """The broker's socket finds that the peer does not take what is sent; the connection itself stays."""
        conn = self.ports[node].conn
        if conn is not None and self._up:
            self.log(f"refuse {node.name}")
            self._deliver(self.core.lost(self.now, conn.key, "did not take what was sent to it"))

    def restart_broker(self) -> None:
        """The broker dies and comes back with another epoch and nothing in its tables."""
        if not self._up:
            return
        self.look()
        self.retired(self.core)
        self._up = False
        for port in self.ports.values():
            self._break(port)
        self._conns.clear()
        self.log("broker dies")
        self.after(self.rng.uniform(0.05, 1.5), self.start_broker)
