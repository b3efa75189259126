# The ring-0 part of the test guest: entries, page tables, descriptor tables, traps. All else runs in ring 3.
#
# On one of the two kinds of host (kernel mode emulated) each instruction here costs more than a microsecond and only
# common integer instructions exist; so the tables are made by the linker, and the gate does single steps only.
# Facts: Intel SDM vol. 3 (long mode, TSS, IDT, local APIC), FREEBSD.md sections 1 and 2 for the two entries.

    .set KERNEL_CODE, 0x08
    .set USER_CODE, 0x1b
    .set USER_DATA, 0x23
    .set TSS_FIRST, 0x28
    .set CPUS_MAX, 32
    .set RING0_STACK, 512
    .set AP_STACK, 16384
    .set HOT_STACK, 1024
    .set SHORT_FRAME, 512
    .set SHORT_BUFFER, 128
    .set SHORT_BUFFERS, 4
    .set VECTORS, 64
    .set TSS_BYTES, 104
    .set TIMER_VECTOR, 33
    .set DEVICE_VECTOR, 40
    .set CR0_VALUE, 0x80000033            # PG NE ET MP PE
    .set CR4_VALUE, 0x620                 # PAE OSFXSR OSXMMEXCPT
    .set RING3_FLAGS, 0x3002        # IOPL 3; interrupts off: they are taken in the halt gate only
    .set EFER, 0xc0000080
    .set EFER_LME, 0x100
    .set LAPIC_ID, 0xfee00020
    .set LAPIC_EOI, 0xfee000b0
    .set FAILED_PORT, 0xf4
    .set FAILED_VALUE, 0xee
    .set RESET_PORT, 0x64
    .set RESET_VALUE, 0xfe

# === Entries ===

    # FreeBSD's loader protocol: long mode, the loader's page tables (identity and KERNBASE windows of the first
    # GiB), modulep at 4(%rsp), kernend at 8(%rsp).
    .section .entry, "ax", @progbits
    .code64
    .globl native_entry
native_entry:
    mov     esi, [rsp + 4]
    mov     edx, [rsp + 8]
    mov     edi, 1
    mov     eax, offset common_entry
    jmp     rax

    .section .text.ring0, "ax", @progbits
    # PVH: 32-bit protected mode, no paging, start_info in ebx. PAE before LME: the other order trips a bug of
    # QEMU's nested SVM.
    .code32
    .globl pvh_entry
pvh_entry:
    mov     eax, CR4_VALUE
    mov     cr4, eax
    mov     eax, offset pml4
    mov     cr3, eax
    mov     ecx, EFER
    rdmsr
    or      eax, EFER_LME
    wrmsr
    mov     eax, CR0_VALUE
    mov     cr0, eax
    lgdt    [gdt_pointer]
    .byte   0xea                    # far jump: intel syntax has no common spelling
    .long   pvh_long
    .short  KERNEL_CODE
    .code64
pvh_long:
    mov     esi, ebx
    xor     edx, edx
    mov     edi, 2

    # edi: protocol, esi and edx: its arguments. Goes on in ring 3.
common_entry:
    mov     eax, offset pml4
    mov     cr3, rax
    mov     eax, CR4_VALUE
    mov     cr4, rax
    mov     eax, CR0_VALUE
    mov     cr0, rax
    mov     esp, offset ring0_stacks + RING0_STACK
    lgdt    [gdt_pointer]
    lidt    [idt_pointer]
    mov     eax, TSS_FIRST
    ltr     ax
    push    USER_DATA
    push    offset first_stack_top - 8
    push    RING3_FLAGS
    push    USER_CODE
    push    offset guest_main
    iretq

    # Forgets the stack of the boot and goes on in guest_serve.
    .globl  enter_service
enter_service:
    mov     esp, offset first_stack_top - 8
    jmp     guest_serve

# === Start of another CPU ===

    # Copied to AP_PAGE (below 1 MiB) by the first CPU; started there by SIPI in real mode, CS base = AP_PAGE.
    .code16
    .globl ap_start
ap_start:
    mov     eax, CR4_VALUE
    mov     cr4, eax
    mov     eax, offset pml4
    mov     cr3, eax
    mov     ecx, EFER
    rdmsr
    or      eax, EFER_LME
    wrmsr
    .byte   0x2e, 0x66, 0x0f, 0x01, 0x16    # lgdtl cs:[gdt_copy - ap_start]
    .short  gdt_copy - ap_start
    mov     eax, CR0_VALUE
    mov     cr0, eax
    .byte   0x66, 0xea
    .long   ap_long
    .short  KERNEL_CODE
    .balign 8
gdt_copy:
    .short  gdt_end - gdt - 1
    .long   gdt
    .globl ap_start_end
ap_start_end:

    .code64
ap_long:
    mov     eax, LAPIC_ID
    mov     eax, [rax]
    shr     eax, 24
    movzx   edi, byte ptr [rax + apic_to_cpu]
    lidt    [idt_pointer]
    mov     eax, edi
    shl     eax, 4
    add     eax, TSS_FIRST
    ltr     ax
    mov     eax, edi
    shl     eax, 9                  # RING0_STACK
    lea     rsp, [rax + ring0_stacks + RING0_STACK]
    mov     eax, edi
    shl     eax, 14                 # AP_STACK
    add     rax, offset ap_stacks - 8
    push    USER_DATA
    push    rax
    push    RING3_FLAGS
    push    USER_CODE
    push    offset guest_ap_main
    iretq

# === The gate from ring 3 ===

    # extern "C" fn, for Rust: rdi: operation, rsi: pointer to eax, ebx, ecx, edx in and out. The ud2 is the gate.
    .globl gate_call
gate_call:
    push    rbx
    mov     r8, rdi
    mov     eax, [rsi]
    mov     ebx, [rsi + 4]
    mov     ecx, [rsi + 8]
    mov     edx, [rsi + 12]
gate_ud2:
    ud2
    mov     [rsi], eax
    mov     [rsi + 4], ebx
    mov     [rsi + 8], ecx
    mov     [rsi + 12], edx
    pop     rbx
    ret

    # Invalid opcode. From gate_ud2: one step of ring-0 work, chosen by r8. From elsewhere: a fault.
invalid_opcode:
    cmp     qword ptr [rsp], offset gate_ud2
    jne     not_the_gate
    add     qword ptr [rsp], 2
    test    r8d, r8d
    jz      gate_halt
    cmp     r8d, 1
    je      gate_cpuid
    cmp     r8d, 2
    je      gate_rdtsc
    cmp     r8d, 3
    je      gate_rdmsr
    cmp     r8d, 4
    je      gate_wrmsr
    cmp     r8d, 5
    je      gate_flush
die:
    cli
    hlt
    jmp     die
not_the_gate:
    push    0
    push    6
    jmp     fault

    # Halt until an interrupt, unless one came since the last halt.
gate_halt:
    mov     rax, rsp
    and     rax, -RING0_STACK
    cmp     dword ptr [rax], 0
    jne     1f
    sti
    hlt
    cli
1:
    mov     dword ptr [rax], 0
    iretq
gate_cpuid:
    cpuid
    iretq
gate_rdtsc:
    rdtsc
    iretq
gate_rdmsr:
    rdmsr
    iretq
gate_wrmsr:
    wrmsr
    iretq
gate_flush:
    mov     rax, cr3
    mov     cr3, rax
    iretq

# === Interrupts and faults ===

    # Any interrupt: note it at the foot of this CPU's ring-0 stack, acknowledge it. The timer's
    # leaves one more note, those of devices are counted.
timer_interrupt:
    push    rax
    mov     rax, rsp
    and     rax, -RING0_STACK
    mov     dword ptr [rax + 4], 1
    pop     rax
    jmp     interrupt
device_interrupt:
    push    rax
    mov     rax, rsp
    and     rax, -RING0_STACK
    inc     dword ptr [rax + 8]
    jmp     1f
interrupt:
    push    rax
    mov     rax, rsp
    and     rax, -RING0_STACK
1:
    mov     dword ptr [rax], 1
    mov     eax, LAPIC_EOI
    mov     dword ptr [rax], 0
    pop     rax
spurious:
    iretq

    # Stack: vector, error, rip, cs, flags, rsp, ss. Notes it all and lets ring 3 tell of it. A second fault, also
    # of another CPU, ends here.
fault:
    cmp     dword ptr [fault_count], 0
    jne     fault_again
    mov     dword ptr [fault_count], 1
    pop     qword ptr [fault_notes]
    pop     qword ptr [fault_notes + 8]
    mov     rax, [rsp]
    mov     [fault_notes + 16], rax
    mov     rax, [rsp + 8]
    mov     [fault_notes + 24], rax
    mov     rax, [rsp + 16]
    mov     [fault_notes + 48], rax
    mov     rax, [rsp + 24]
    mov     [fault_notes + 32], rax
    mov     rax, cr2
    mov     [fault_notes + 40], rax
    mov     qword ptr [rsp], offset guest_fault
    mov     qword ptr [rsp + 8], USER_CODE
    mov     qword ptr [rsp + 16], RING3_FLAGS
    mov     qword ptr [rsp + 24], offset fault_stack_top - 8
    mov     qword ptr [rsp + 32], USER_DATA
    iretq
fault_again:
    mov     al, FAILED_VALUE
    out     FAILED_PORT, al
    mov     al, RESET_VALUE
    out     RESET_PORT, al
    jmp     die

    # One stub of 16 bytes for each vector.
    .balign 4096
    .globl vectors
vectors:
    .set    vector_number, 0
    .rept   VECTORS
    .balign 16
    .if vector_number == 6
    jmp     invalid_opcode
    .elseif vector_number == VECTORS - 1
    jmp     spurious
    .elseif vector_number == TIMER_VECTOR
    jmp     timer_interrupt
    .elseif vector_number >= DEVICE_VECTOR
    jmp     device_interrupt
    .elseif vector_number >= 32
    jmp     interrupt
    .else
    # 8, 10 to 14, 17, 21 and 30 come with an error code.
    .if (vector_number != 8) && ((vector_number < 10) || (vector_number > 14)) && (vector_number != 17) && (vector_number != 21) && (vector_number != 30)
    push    0
    .endif
    push    vector_number
    jmp     fault
    .endif
    .set    vector_number, vector_number + 1
    .endr

# === Tables ===

    .section .note.Xen, "a", @note
    .balign 4
    .long   4, 8, 18                # name bytes, descriptor bytes, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz  "Xen"
    .quad   pvh_entry

    # Identity map of the first 4 GiB in 2 MiB pages, open to ring 3, accessed and dirty already set. Slot 1 of the
    # root is the arena's, filled by Rust.
    .section .tables, "aw", @progbits
    .balign 4096
    .globl pml4
pml4:
    .quad   low_directories + 0x67
    .fill   511, 8, 0
low_directories:
    .quad   identity + 0x67, identity + 0x1067, identity + 0x2067, identity + 0x3067
    .fill   508, 8, 0
identity:
    .set    identity_entry, 0xe7    # present, write, user, accessed, dirty, 2 MiB
    .rept   2048
    .quad   identity_entry
    .set    identity_entry, identity_entry + 0x200000
    .endr

    .section .hot, "aw", @progbits
    .balign 4096
    .balign 16
idt:
    .set    vector_number, 0
    .rept   VECTORS
    .short  vectors_low + vector_number * 16, KERNEL_CODE
    .short  0x8e00                  # interrupt gate, ring 0
    .short  vectors_high
    .long   0, 0
    .set    vector_number, vector_number + 1
    .endr
idt_end:
    .balign 16
    .globl gdt
gdt:
    .quad   0
    .quad   0x00af9b000000ffff      # ring-0 code
    .quad   0x00cf93000000ffff      # ring-0 data
    .quad   0x00affb000000ffff      # ring-3 code
    .quad   0x00cff3000000ffff      # ring-3 data
    .globl tss_descriptors
tss_descriptors:
    # The first CPU's is whole here; Rust fills in the others.
    .short  io_map_end - tss_list - 1, tss_first_low
    .byte   tss_first_middle, 0x89, 0, 0
    .quad   0
    .fill   2 * (CPUS_MAX - 1), 8, 0
gdt_end:
    .balign 16
    .globl tss_list
tss_list:
    # Of a TSS only RSP0 is used, and the I/O map, one for all, which opens the ports below 0x400 to ring 3. IOPL
    # 3 opens them too; both, because a host that emulates iretq may drop IOPL, and one that emulates SVM refuses the map of
    # a task that was restored (it wants the descriptor's type not busy).
    .set    cpu_number, 1
    .rept   CPUS_MAX
    .long   0
    .quad   ring0_stacks + RING0_STACK * cpu_number
    .fill   22, 4, 0
    .short  0, (CPUS_MAX - cpu_number + 1) * TSS_BYTES
    .set    cpu_number, cpu_number + 1
    .endr
    .fill   0x400 / 8, 1, 0
    .byte   0xff
    .globl  io_map_end
io_map_end:
    .balign 16
idt_pointer:
    .short  idt_end - idt - 1
    .quad   idt
    .balign 16
gdt_pointer:
    .short  gdt_end - gdt - 1
    .quad   gdt
    .globl apic_to_cpu
apic_to_cpu:
    .fill   256, 1, 0
    .balign 8
    .globl fault_notes
fault_notes:
    .fill   7, 8, 0                 # vector, error, rip, cs, rsp, cr2, flags
fault_count:
    .long   0

    # One page holds nearly all that a wake-up and a short answer write: a clone pays for each page that it writes first. The
    # stack that grows down from here is a new one once the boot is over (enter_service).
    .section .bss.hot, "aw", @nobits
    .balign 4096
    .skip   16384
    .skip   HOT_STACK
first_stack_top:
    .globl  console_rings
console_rings:
    .skip   1024
    .globl  short_request
short_request:
    .skip   SHORT_FRAME
    .globl  short_reply
short_reply:
    .skip   SHORT_FRAME
    .globl  short_buffers
short_buffers:
    .skip   SHORT_BUFFER * SHORT_BUFFERS
    # Ring-0 stacks, the first CPU's last in the page; at the foot of each: "an interrupt came", "the timer's came",
    # count of devices' interrupts.
    .globl  ring0_stacks
ring0_stacks:
    .skip   RING0_STACK * CPUS_MAX
    .section .bss, "aw", @nobits
    .balign 4096
    .skip   8192
fault_stack_top:
    .skip   AP_STACK * (CPUS_MAX - 1)
    .set    ap_stacks, fault_stack_top
