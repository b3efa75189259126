/*
 * Keeps two KVM virtual machines open, never run, for as long as the rig lives.
 *
 * KVM counts some rare things in static keys of the outer kernel: that there is a VM at all (preempt_notifier_key, in
 * __schedule), a vCPU without a local APIC in KVM (kvm_has_noapic_vcpu), one whose local APIC is disabled by its base
 * register or, as after reset, by software (apic_hw_disabled, apic_sw_disabled). The first one and the last one of each
 * switch the key, which patches kernel text through int3, and QEMU's TCG now and then goes on running the int3 after it
 * has been patched away again: the processor takes the same breakpoint for ever, with interrupts disabled, and the rig
 * stands. With one of each kept here nothing switches.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int check(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		_exit(1);
	}
	return result;
}

int main(void)
{
	struct kvm_enable_cap split = { .cap = KVM_CAP_SPLIT_IRQCHIP, .args = { 24 } };
	struct kvm_sregs registers;
	int kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	int vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	int without_apic = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	int disabled;

	check(ioctl(without_apic, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	check(ioctl(vm, KVM_ENABLE_CAP, &split), "KVM_CAP_SPLIT_IRQCHIP");
	check(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	disabled = check(ioctl(vm, KVM_CREATE_VCPU, 1), "KVM_CREATE_VCPU");
	check(ioctl(disabled, KVM_GET_SREGS, &registers), "KVM_GET_SREGS");
	registers.apic_base = 0;
	check(ioctl(disabled, KVM_SET_SREGS, &registers), "KVM_SET_SREGS");
	puts("held");
	fflush(stdout);
	for (;;)
		pause();
}
