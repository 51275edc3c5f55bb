"""What is known of devices by their names, and measured of a CPU."""

from flashi2v_model.machines import machine_of, measure_cpu, peak_flops


def test_peaks_are_known_by_what_devices_call_themselves():
    known = {
        "1 x NVIDIA H100 80GB HBM3": 989e12,
        "2 x NVIDIA H100 PCIe": 756e12,
        "1 x NVIDIA H200": 989e12,
        "8 x NVIDIA A100-SXM4-80GB": 312e12,
        "1 x NVIDIA A10": 125e12,
        "1 x NVIDIA L40S": 362e12,
        "1 x NVIDIA GeForce RTX 4090": 165e12,
        "8 x Ascend910B2": 354e12,
        "8 x Ascend910B2C": 354e12,
        "8 x Ascend910B4-1": 246e12,
    }
    assert {name: peak_flops(name) for name in known} == known
    for other in ("2 threads", "1 x NVIDIA RTX A1000", "1 x NVIDIA A10G", "1 x NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert peak_flops(other) is None, other


def test_links_are_those_of_the_product_and_pcie_where_it_has_none():
    found = {name: machine_of(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA A800-SXM4-80GB", "NVIDIA L40S")}
    assert [machine.bandwidth for machine in found.values()] == [450e9, 200e9, 25e9]
    assert machine_of("an abacus") is None
    assert found["NVIDIA L40S"].slowed(8) == 1


def test_processes_share_the_cores_of_a_cpu():
    machine = measure_cpu(0.01)
    assert machine.flops > 1e8
    assert machine.memory > 1e7
    assert machine.slowed(machine.cores) == 1
    assert machine.slowed(3 * machine.cores) == 3
